import torch

from models.tokenizers.transformer import SemanticDecoder, SemanticDecoderConfig, TransformerBlock


def test_block_equals_torchs_own_encoder_layer() -> None:
    torch.manual_seed(0)
    ours = TransformerBlock(16, 4).eval()
    theirs = torch.nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).eval()
    names = {
        "norm1": "norm1", "norm2": "norm2", "out": "self_attn.out_proj", "mlp.0": "linear1", "mlp.2": "linear2",
    }  # fmt: skip
    state = {f"{new}.{part}": ours.state_dict()[f"{old}.{part}"] for old, new in names.items() for part in _PARTS}
    state |= {f"self_attn.in_proj_{part}": ours.state_dict()[f"qkv.{part}"] for part in _PARTS}
    theirs.load_state_dict(state)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x))


_PARTS = ("weight", "bias")


def test_semantic_decoder_sees_every_position_and_knows_where_it_is() -> None:
    torch.manual_seed(0)
    decoder = SemanticDecoder(SemanticDecoderConfig(width=16, depth=2, heads=2), 4, 6, (2, 3)).eval()
    vectors = torch.randn(1, 2, 3, 4, requires_grad=True)
    output = decoder(vectors)
    assert output.shape == (1, 2, 3, 6)
    output[0, 0, 0].sum().backward()
    assert vectors.grad is not None
    assert bool((vectors.grad.abs().sum(-1) > 0).all())
    same = decoder(torch.ones(1, 2, 3, 4))
    assert not torch.allclose(same[0, 0, 0], same[0, 1, 2])
