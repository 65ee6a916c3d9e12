"""Experiments: demo, bench, and the lab."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stablegen.cli.options import AsJson, Model, PageFile, Revision
from stablegen.cli.shared import listed, new_console, opened_output, progress_bar, read_input, text_of, whole

if TYPE_CHECKING:
    from stablegen.lab.bench import Report
    from stablegen.lab.report import LabReport

app = typer.Typer()
lab = typer.Typer(help="See batch variance on this machine: four experiments.", no_args_is_help=True)
app.add_typer(lab, name="lab")

DeviceName = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtypes = Annotated[
    list[str] | None, typer.Option("--dtype", help="float32, float16 or bfloat16; repeat it, or separate by commas.")
]
NumberSeed = Annotated[int, typer.Option(help="Draws the numbers.")]
PromptFile = Annotated[Path | None, typer.Option(help="File of prompts, JSON lines or text lines; its own if none.")]
PromptCount = Annotated[
    int | None, typer.Option("--count", help="Prompts from the beginning; of its own 103, 48 on a GPU and 24 on a CPU.")
]
FlipTokens = Annotated[int, typer.Option("--tokens", help="Tokens of an answer at most.")]


@app.command()
def demo(as_json: AsJson = False) -> None:
    """Show batch variance, the policies that end it, and the verdicts, measured here and now (under a minute)."""
    from stablegen.lab.demo import measure, render

    with progress_bar("measurements") as progress:
        report = measure(progress)
    if as_json:
        print(report.model_dump_json())
    else:
        render(report, new_console())


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Option(help="Hub name, local directory or tiny-gpt2; none: tiny-gpt2 on a CPU, as --random on a GPU."),
    ] = None,
    revision: Revision = None,
    random_weights: Annotated[
        bool, typer.Option("--random", help="GPT-2 small's shape with random weights; nothing is downloaded.")
    ] = False,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, float16 or bfloat16; repeat it, or separate by commas.")
    ] = None,
    batch: Annotated[list[str] | None, typer.Option(help="Batch sizes; repeat it, or separate by commas.")] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of each prompt.")] = None,
    tokens: Annotated[int | None, typer.Option(help="New tokens of each call.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Measured runs of each arm; 5 if none.")] = None,
    arms: Annotated[
        list[str] | None,
        typer.Option(
            help="invariant, vendor, single, padded, eager, static, batch_invariant_ops; all if none, single and "
            "static at batch 1 alone unless they are named."
        ),
    ] = None,
    prefill: Annotated[str | None, typer.Option(help="PROMPTSxTOKENS of the prefill measured; 0: none.")] = None,
    golden: Annotated[int | None, typer.Option(help="Prompts of the golden set measured; 0: none.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    plot: Annotated[Path | None, typer.Option(help="Draw the step times into this .png, .svg or .pdf.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON to this file as well, after each table.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure here what each policy costs against transformers and against the memory's speed.

    What is not given suits the device: on a GPU float32 and a 16-bit dtype, batches 1, 8, 32, 64, 256, prompts of 32
    tokens and 128 new ones, a prefill of 16x512 and a golden set of 1000; on a CPU a small part of that.
    """
    from stablegen.lab.plot import check_plot, draw

    sizes = whole("--batch", batch)
    if plot is not None:
        check_plot(plot)
    from stablegen.lab.bench import Options, measure, render

    def save(report: Report) -> None:
        with opened_output(out) as write:
            write(report.model_dump_json(indent=1))

    options = Options(
        model=model,
        revision=revision,
        random_weights=random_weights,
        dtypes=listed(dtype),
        batches=sizes,
        prompt=prompt,
        tokens=tokens,
        repeats=repeats,
        arms=listed(arms),
        prefill=prefill,
        golden=golden,
        device=device,
    )
    with progress_bar("runs") as progress:
        report = measure(options, progress, keep=None if out is None else save)
    if out is not None:
        save(report)
    if as_json:
        print(report.model_dump_json())
    else:
        render(report, new_console())
    if plot is not None:
        draw(report, plot)
    if report.cells and all(cell.problem is not None for cell in report.cells):
        raise typer.Exit(1)


@lab.command()
def associativity(
    count: Annotated[int, typer.Option(help="Random numbers of the sum, a power of two.")] = 4096,
    seed: NumberSeed = 0,
    device: DeviceName = "auto",
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Add up the same numbers in several orders, and see several results."""
    with _experiment("associativity", html, as_json=as_json) as (progress, show):
        from stablegen.lab.associativity import measure

        show(measure(device=device, count=count, seed=seed, progress=progress("dtypes")))


@lab.command()
def matmul(
    shape: Annotated[str, typer.Option(help="MxNxK of the product.")] = "512x512x512",
    batch: Annotated[list[str] | None, typer.Option(help="Matrices; 1-10, 100, 1000 if none.")] = None,
    rows: Annotated[list[str] | None, typer.Option(help="Rows beside row 0; 1 to 512 if none.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="float32, tf32, float16, bfloat16; all if none.")] = None,
    search: Annotated[bool, typer.Option(help="Look for shapes whose product moves.")] = True,
    seed: NumberSeed = 0,
    device: DeviceName = "auto",
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Multiply two matrices alone and in company, by the vendor's libraries and by stablegen's kernels."""
    given: dict[str, Any] = {"batches": whole("--batch", batch), "rows": whole("--rows", rows)}
    given |= {"precisions": listed(precision), "shape": whole("--shape", shape.split("x"))}
    with _experiment("matmul", html, as_json=as_json) as (progress, show):
        from stablegen.lab.matmul import measure

        chosen = {name: value for name, value in given.items() if value}
        show(measure(**chosen, search=search, device=device, seed=seed, progress=progress("products")))


@lab.command()
def layers(
    model: Model = None,
    revision: Revision = None,
    random_weights: Annotated[bool, typer.Option("--random", help="GPT-2 small's shape, random weights.")] = False,
    dtype: Dtypes = None,
    batch: Annotated[list[str] | None, typer.Option(help="Batch sizes; 2 to 64 if none.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of the sequence.")] = 32,
    seed: NumberSeed = 0,
    device: DeviceName = "auto",
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Compare each layer of a transformer for one sequence, alone and in larger and larger batches."""
    given = {"batches": sizes} if (sizes := whole("--batch", batch)) else {}
    with _experiment("layers", html, as_json=as_json) as (progress, show):
        from stablegen.lab.layers import measure

        show(
            measure(
                model=model,
                revision=revision,
                random_weights=random_weights,
                dtypes=listed(dtype),
                length=length,
                device=device,
                seed=seed,
                progress=progress("batches"),
                **given,
            )
        )


@lab.command()
def flips(
    model: Model = None,
    revision: Revision = None,
    dtype: Dtypes = None,
    batch: Annotated[list[str] | None, typer.Option(help="Batch sizes; 1 to 32 if none.")] = None,
    baseline: Annotated[int, typer.Option(help="The batch size that others are compared with.")] = 2,
    padding: Annotated[list[str] | None, typer.Option(help="Tokens of padding; 1, 16, 64 if none.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="single, padded:8 and invariant if none.")] = None,
    tokens: FlipTokens = 8,
    prompts: PromptFile = None,
    count: PromptCount = None,
    device: DeviceName = "auto",
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Answer prompts in many companies: which answers flip, by what cause, and that none does under the policies."""
    given: dict[str, Any] = {"batches": whole("--batch", batch), "pads": whole("--padding", padding)}
    chosen = {name: value for name, value in given.items() if value}
    if policy is not None:
        chosen["policies"] = listed(policy)
    with _experiment("flips", html, as_json=as_json) as (progress, show):
        from stablegen.lab.flips import measure

        show(
            measure(
                model=model,
                revision=revision,
                dtypes=listed(dtype),
                baseline=baseline,
                tokens=tokens,
                prompts=None if prompts is None else [text_of(line) for line in read_input(None, prompts)],
                count=count,
                device=device,
                progress=progress("prompts"),
                **chosen,
            )
        )


@lab.command(name="all")
def all_experiments(
    model: Model = None,
    revision: Revision = None,
    dtype: Dtypes = None,
    tokens: FlipTokens = 8,
    prompts: PromptFile = None,
    count: PromptCount = None,
    seed: NumberSeed = 0,
    device: DeviceName = "auto",
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Run all four experiments, and make one report of them."""
    with _experiment(None, html, as_json=as_json) as (progress, show):
        from stablegen.lab.report import measure

        show(
            measure(
                model=model,
                revision=revision,
                dtypes=listed(dtype),
                tokens=tokens,
                prompts=None if prompts is None else [text_of(line) for line in read_input(None, prompts)],
                count=count,
                device=device,
                seed=seed,
                progress=progress,
            )
        )


@lab.command()
def join(
    files: Annotated[list[Path], typer.Argument(help="Files of what --json printed.")],
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Make one report of experiments that were run apart; of `flips`, dtypes that were."""
    from stablegen.lab.report import join as joined
    from stablegen.lab.report import read_report

    _show_lab(joined([read_report(file) for file in files]), html, as_json=as_json)


@contextmanager
def _experiment(
    name: str | None, html: Path | None, *, as_json: bool
) -> Iterator[tuple[Callable[[str], Callable[[int, int], None] | None], Callable[[Any], None]]]:
    """Yield who hears how far an experiment is, and what shows its report: of ``name``, or of all."""
    from stablegen.lab.report import report_of
    from stablegen.pages.render import check_page

    if html is not None:
        check_page(html)
    found: list[Any] = []
    with contextlib.ExitStack() as bars:

        def progress(what: str) -> Callable[[int, int], None] | None:
            bars.close()  # the one before is done
            return bars.enter_context(progress_bar(what))

        yield progress, found.append
    _show_lab(found[0] if name is None else report_of(**{name: found[0]}), html, as_json=as_json)


def _show_lab(report: LabReport, html: Path | None, *, as_json: bool) -> None:
    from stablegen.lab.report import render

    if as_json:
        print(report.model_dump_json())
    else:
        render(report, new_console())
    if html is not None:
        from stablegen.pages.lab import write

        write(report, html)
    if report.problems:
        raise typer.Exit(1)
