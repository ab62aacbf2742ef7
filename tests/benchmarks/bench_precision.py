"""What `precision: auto` is on this CPU, against the other type: layers, encoding, and a fine-tuning step of `mini`.

python -m tests.benchmarks.bench_precision [--repeats 3]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

from models.language.vlm import build_small_llm
from models.language.vocabulary import extend_tokenizer, train_bpe
from models.tokenizers.kinds import build_tokenizer, tokenizer_config
from stages.pipeline.recipe import Recipe, load_recipe
from stages.runtime.devices import Precision, autocast, native_precision
from tests.benchmarks.measuring import measure, report

CPU = torch.device("cpu")
Case = Callable[[], object]


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    auto = native_precision("cpu")
    other: Precision = "fp32" if auto == "bf16" else "bf16"
    recipe = load_recipe("mini")
    for name, case in _cases(recipe).items():
        seconds = {}
        for precision in (auto, other):
            with autocast(CPU, precision):
                seconds[precision] = measure(case, CPU, repeats=arguments.repeats).seconds
        report(f"{name}: auto ({auto}) against {other}", seconds[auto] * 1e3, seconds[other] * 1e3, "ms")


def _cases(recipe: Recipe) -> dict[str, Case]:
    """Each is called under autocast."""
    torch.manual_seed(0)
    layers: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "3x3 convolution, 64 to 64 channels, 8 x 32 x 32": (nn.Conv2d(64, 64, 3, padding=1), (8, 64, 32, 32)),
        "depthwise 3x3 convolution, 64 channels, 8 x 32 x 32": (
            nn.Conv2d(64, 64, 3, padding=1, groups=64),
            (8, 64, 32, 32),
        ),
        "linear layer, 256 to 768, 2688 tokens": (nn.Linear(256, 768), (2688, 256)),
    }
    cases: dict[str, Case] = {name: _forward(layer, torch.randn(shape)) for name, (layer, shape) in layers.items()}
    config = tokenizer_config(recipe.tokenizer.model_dump() | {"kind": "vqgan"})
    tokenizer = build_tokenizer(config, None).eval()
    side = config.transform.image_size
    cases["encoding 8 images with mini's image encoder"] = _forward(tokenizer.encode, torch.rand(8, 3, side, side))
    cases["forward and backward pass of mini's language model, 32 x 84 tokens"] = _language_model(recipe)
    return cases


def _forward(layer: Callable[[torch.Tensor], object], inputs: torch.Tensor) -> Case:
    def call() -> None:
        with torch.no_grad():
            layer(inputs)

    return call


def _language_model(recipe: Recipe) -> Case:
    grid = recipe.tokenizer.grid
    tokenizer = train_bpe(["a photo of bread"], recipe.pretrain.llm.bpe_vocab_size)
    vocabulary = extend_tokenizer(tokenizer, (recipe.tokenizer.quantizer.codebook_size,), (1, 1, *grid))
    model = build_small_llm(recipe.pretrain.llm, vocabulary)
    token_ids = torch.randint(vocabulary.size, (recipe.sft.batch_size, 84))
    return lambda: model(input_ids=token_ids, labels=token_ids, use_cache=False).loss.backward()


if __name__ == "__main__":
    main()
