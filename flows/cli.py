"""The `musevl` command line. Commands import what they need when they run, so that `musevl --help` answers at once."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.artifact_commands import artifacts_app
from flows.options import (
    DigestArgument,
    ExecutorOption,
    RecipeOption,
    RetryOption,
    SetOption,
    StoreOption,
    open_store,
)
from flows.text import one_line, text_table
from infra.interrupts import GOES_ON, advise, end_on_signals
from infra.malloc import reexec_with_fast_malloc
from infra.terminal import LogFormatter, said_if_slow, say
from stages.pipeline.command import DEFAULT_STORE, result_line, run_one_stage
from stages.pipeline.errors import EXIT_CODE, USER_ERRORS, complain, report
from stages.pipeline.field_reference import fields_text
from stages.pipeline.recipe_files import available_recipes, check_stage_name, recipe_values
from stages.runtime.process import prepare_process

if TYPE_CHECKING:
    from models.images import Limits
    from stages.pipeline.assistant import Assistant
    from stages.pipeline.recipe import Recipe
    from storage.store import Store


app = typer.Typer(
    name="musevl",
    help="From image-text pairs to a unified vision-language model over discrete visual codes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(artifacts_app, name="artifacts")

MAX_PROMPT = 8000
"""Largest number of characters of a prompt or a question; language models of the papers' sizes read as many tokens."""


def main() -> None:
    """Entry point of the process."""
    reexec_with_fast_malloc()
    end_on_signals()
    raise SystemExit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run a command line; user errors become one line on stderr and exit code 2.

    Every command first checks what it was given, as far as that goes without importing PyTorch.
    """
    if logging.lastResort is not None:  # the handler of commands that set up no logging
        logging.lastResort.setFormatter(LogFormatter())
    try:
        return app(arguments, prog_name="musevl", standalone_mode=False) or 0
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            return EXIT_CODE
        context = getattr(error, "ctx", None)
        hint = f"; see `{context.command_path} --help`" if context is not None else ""
        return complain(error.format_message().rstrip(".").replace("Value error, ", "") + hint)
    except USER_ERRORS as error:
        return report(error)


@app.command()
def run(
    recipe: RecipeOption = "mini",
    store: StoreOption = DEFAULT_STORE,
    executor: ExecutorOption = "ray",
    overrides: SetOption = None,
    retry_failed: RetryOption = False,
) -> None:
    """Run the whole pipeline; stages that the store has already are skipped. Ends with a report."""
    advise(GOES_ON)
    recipe_values(recipe, overrides)
    from flows.local_run import run_pipeline

    if retry_failed:
        overrides = _next_attempt(recipe, store, overrides)
    summaries = run_pipeline(recipe, store, overrides or [], executor)
    rows = [[s.stage, "hit" if s.hit else "made", s.digest[:12], f"{s.seconds:.1f}"] for s in summaries]
    say(text_table(["stage", "result", "artifact", "seconds"], rows))
    loaded, opened = _load(recipe, overrides), open_store(store)
    say("\n" + _metrics_text(_read_metrics(opened, summaries[-1].digest)))
    from flows.report.report import write_report

    say(f"\nreport: {write_report(loaded, opened, Path('.musevl/report') / loaded.name)}")


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="Name of the stage, for example tokenize.")],
    recipe: RecipeOption = "mini",
    store: StoreOption = DEFAULT_STORE,
    executor: ExecutorOption = "ray",
    overrides: SetOption = None,
    retry_failed: RetryOption = False,
) -> None:
    """Run one stage; its inputs must be in the store."""
    advise(GOES_ON)
    check_stage_name(name)
    if retry_failed:
        overrides = _next_attempt(recipe, store, overrides)
    say(result_line(run_one_stage(name, recipe, store, executor, overrides or [])))


@app.command("compare-tokenizers")
def compare_tokenizers(
    recipe: RecipeOption = "mini",
    store: StoreOption = DEFAULT_STORE,
    executor: ExecutorOption = "ray",
    overrides: SetOption = None,
    kinds: Annotated[
        str,
        typer.Option(
            help="Values of tokenizer.kind, variants (sde-image, dualtoken-deep, ...) or external=FOLDER; with commas."
        ),
    ] = "vqgan,sde-image,semantic,sde,tokenflow,dualtoken,dualtoken-deep,dualtoken-reconstruction,vila_u",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas; each kind is trained once a seed.")] = "0",
) -> None:
    """Train each kind of tokenizer and the same language model on its codes; print the papers' tables.

    What the store has already is not trained again. A page with pictures and a Parquet table are written too.
    """
    advise(GOES_ON)
    recipe_values(recipe, overrides)
    listed, numbers = _kinds(kinds), _integers(seeds, "--seeds")
    from flows.local_run import run_comparison

    comparison = run_comparison(recipe, store, overrides or [], executor, listed, numbers)
    say(comparison.text())
    from flows.report.report import write_comparison

    folder = Path(".musevl/report") / f"{comparison.recipe}-tokenizers"
    say(f"\npage: {write_comparison(comparison, open_store(store), folder)}\nrows: {folder / 'comparison.parquet'}")


@app.command("import-tokenizer")
def import_tokenizer(
    checkpoint: Annotated[Path, typer.Argument(help="A published checkpoint, for example vq_ds16_c2i.pt.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Weights file to write.")] = Path("tokenizer.safetensors"),
    recipe: RecipeOption = "paper-vqgan-256",
    which: Annotated[
        str | None,
        typer.Option(
            help="Key of the weights to take from a training's checkpoint, for example model (default: averaged ones, "
            "as ema, where there are such)."
        ),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Turn published tokenizer weights (LlamaGen's or DualToken's layout) into a file for `tokenizer.weights`."""
    recipe_values(recipe, overrides)
    if not checkpoint.is_file():
        raise ValueError(f"there is no checkpoint file {checkpoint}; give the path of one")
    from stages.pipeline.import_tokenizer import import_weights

    prepare_process()
    if taken := import_weights(checkpoint, _load(recipe, overrides), out, which):
        say(f"{checkpoint}: {taken}", file=sys.stderr)
    given = "".join(f"--set {shlex.quote(override)} " for override in overrides or [])
    say(
        f"{out}\nuse it as it is: musevl stage train_tokenizer --recipe {recipe} {given}"
        f"--set tokenizer.weights={out} --set tokenizer.steps=0"
    )


@app.command("import-codes")
def import_codes(
    codes: Annotated[Path, typer.Argument(help="Folder of Parquet files in the code table's layout.")],
    recipe: RecipeOption = "mini",
    store: StoreOption = DEFAULT_STORE,
    executor: ExecutorOption = "ray",
    overrides: SetOption = None,
) -> None:
    """Take the codes that another project's tokenizer made of a recipe's images; the recipe must be downloaded."""
    advise(GOES_ON)
    recipe_values(recipe, overrides)
    from storage.code_table import code_files

    code_files(codes, "CODES")
    given = [*(overrides or []), "tokenizer.kind=external", f"tokenizer.codes={codes.absolute()}"]
    for name in ("train_tokenizer", "tokenize"):
        say(result_line(run_one_stage(name, recipe, store, executor, given)))
    say(f"compare them: musevl compare-tokenizers --recipe {recipe} --kinds vqgan,sde,external={codes.absolute()}")


@app.command()
def recipes() -> None:
    """List the recipes that ship with the project."""
    loaded = [recipe_values(name) for name in available_recipes()]
    say(text_table(["recipe", "description"], [[recipe["name"], recipe["description"]] for recipe in loaded]))


@app.command()
def fields(
    path: Annotated[
        str | None, typer.Argument(metavar="SECTION[.FIELD]", help="For example sft.optimiser (default: the sections).")
    ] = None,
) -> None:
    """Print the fields of a recipe: values, default, whether the result's identity depends on it, meaning."""
    say(fields_text(path))


@app.command()
def results(
    recipe: Annotated[str | None, typer.Option("--recipe", help="Only runs of this recipe: name, or path.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a metric.")] = False,
) -> None:
    """Print the metrics of the last completed run."""
    opened = open_store(store)
    if recipe and Path(recipe).suffix in (".yaml", ".yml"):
        recipe = str(recipe_values(recipe)["name"])  # as in the record of a run
    for record in opened.runs():
        complete = {"artifact", "recipe", "finished"} <= set(record)
        if complete and record.get("stage") == "evaluate" and recipe in (None, record["recipe"]):
            break
    else:
        of_recipe = f" of recipe {recipe!r}" if recipe else ""
        command = f"musevl run --recipe {recipe or 'mini'}"
        raise ValueError(f"the store {opened.uri} holds no completed run{of_recipe}; run `{command}` first")
    rows = _read_metrics(opened, record["artifact"])
    if as_json:
        say(json.dumps(rows, indent=2))
        return
    about = f"recipe {record['recipe']}, finished {record['finished']}, artifact {record['artifact'][:12]}"
    say(f"{one_line(about)}\n")
    say(_metrics_text(rows))


@app.command()
def inspect(
    artifact: DigestArgument,
    store: StoreOption = DEFAULT_STORE,
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path(".musevl/inspect"),
    num_images: Annotated[int, typer.Option("--images", min=0, max=10_000, help="How many rows to decode.")] = 36,
    codes: Annotated[str, typer.Option(help="Codes, with commas: draw the image patches that carry them.")] = "",
) -> None:
    """Show a code table: schema, rows, how its codes are used, and pictures of decoded rows.

    Of a download: what became of its rows, by status, reason and host.
    """
    chosen = _integers(codes, "--codes") if codes else []
    from flows.download_text import KIND, inspect_download

    opened = open_store(store)
    if (manifest := opened.load(artifact)).kind == KIND:
        say(inspect_download(opened, manifest))
        return
    from flows.inspection import inspect_code_table, inspect_codes

    prepare_process()
    say(inspect_code_table(opened, artifact, out, num_images=num_images))
    if chosen:
        say("\n" + inspect_codes(opened, artifact, out, chosen))


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[str, typer.Argument(help="The question.")],
    recipe: RecipeOption = "mini",
    store: StoreOption = DEFAULT_STORE,
    overrides: SetOption = None,
) -> None:
    """Answer a question about an image with the trained model."""
    _check_text(question, "the question")
    recipe_values(recipe, overrides)
    if not image.is_file():
        raise ValueError(f"there is no image file {image}; give the path of one")
    picture = _read_image(image, _load(recipe, overrides).download.limits)
    say(_assistant(recipe, store, overrides).ask(picture, question))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Image file to write.")] = Path("out.png"),
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
    guidance: Annotated[
        float | None,
        typer.Option(min=0, max=1000, help="Classifier-free guidance scale (default: recipe's)."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=100, help="Of the sampling (default: recipe's).")
    ] = None,
    recipe: RecipeOption = "mini",
    store: StoreOption = DEFAULT_STORE,
    overrides: SetOption = None,
) -> None:
    """Draw an image for a prompt with the trained model."""
    _check_text(prompt, "the prompt")
    recipe_values(recipe, overrides)
    _check_image_target(out)
    assistant = _assistant(recipe, store, overrides)
    drawn = assistant.draw(prompt, num_images=1, guidance=guidance, temperature=temperature, seed=seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn[0].save(out)
    say(out)


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _integers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in _listed(text)]
    except ValueError:
        numbers = []
    if not numbers or max(numbers) >= 2**63:
        raise ValueError(f"{option} {text!r} is not a list of integers; write for example {option} 0,1,2")
    return numbers


def _kinds(text: str) -> list[str]:
    kinds = _listed(text)
    if not kinds:
        raise ValueError("--kinds names no tokenizer; write for example --kinds vqgan,sde")
    for kind in kinds:
        if kind.startswith("external="):
            from storage.code_table import code_files

            code_files(kind.removeprefix("external="), f"--kinds {kind}")
    return kinds


def _check_text(text: str, what: str) -> None:
    """Raise ValueError for text that is not UTF-8 or too long for any model."""
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8 arrive as lone surrogates
        raise ValueError(f"{what} is not UTF-8; write it in a terminal with a UTF-8 locale") from None
    if len(text) > MAX_PROMPT:
        raise ValueError(f"{what} has {len(text)} characters; a model reads at most {MAX_PROMPT} here")


def _load(recipe: str, overrides: list[str] | None) -> Recipe:
    from stages.pipeline.recipe import load_recipe

    return load_recipe(recipe, overrides)


def _next_attempt(recipe: str, store: str, overrides: list[str] | None) -> list[str]:
    """Return the overrides with a new attempt number, with which failed rows are fetched again."""
    from stages.download.stage import next_attempt

    loaded = _load(recipe, overrides)
    setting = f"download.attempt={next_attempt(loaded.download, loaded.seed, open_store(store, 'create'))}"
    say(f"{setting}: keep it for later commands with `--set {setting}`, or in the recipe", file=sys.stderr)
    return [*(overrides or []), setting]


def _assistant(recipe: str, store: str, overrides: list[str] | None) -> Assistant:
    prepare_process()
    with said_if_slow(f"loading the model of recipe {recipe}"):
        from stages.pipeline.assistant import Assistant

        return Assistant(_load(recipe, overrides), open_store(store))


def _read_image(path: Path, limits: Limits) -> bytes:
    """Read the bytes of an image, and raise ValueError if it cannot be decoded."""
    from models.images import IMAGE_FORMATS, UnusableImage, decode_image

    try:
        with path.open("rb") as file:
            data = file.read(-1 if limits.max_bytes is None else limits.max_bytes + 1)
        decode_image(data, limits)
    except UnusableImage as error:
        remedy = (
            "raise download.max_bytes or download.max_pixels with --set, or scale it down"
            if error.kind in ("too_large", "too_many_pixels")
            else f"give one of {', '.join(IMAGE_FORMATS)}"
        )
        raise ValueError(f"{path} cannot be read as an image ({error.reason}); {remedy}") from error
    return data


def _check_image_target(path: Path) -> None:
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out {path} has no known image suffix; name the file for example out.png")


def _read_metrics(store: Store, digest: str) -> list[dict[str, Any]]:
    from storage.tables import read_metrics

    return read_metrics(store.fetch(store.load(digest).file("metrics.parquet")))


def _metrics_text(rows: list[dict[str, Any]]) -> str:
    from stages.metrics.catalogue import direction_of, full_name, text_of

    cells = []
    for row in rows:
        name = full_name(row["metric"], row["qualifier"])
        value, low, high = (
            "" if row[key] is None else text_of(name, row[key]) for key in ("value", "ci_low", "ci_high")
        )
        interval = f"{low} to {high}" if low else ""
        cells.append([row["model"], row["role"], row["benchmark"], row["split"], name, value, interval])
        cells[-1] += [direction_of(name), str(row["num_samples"])]
    header = ["model", "role", "benchmark", "split", "metric", "value", "interval", "better", "samples"]
    return text_table(header, cells)


if __name__ == "__main__":
    main()
