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
from stablegen.lab.compared import arm_names, promising_policies

if TYPE_CHECKING:
    from stablegen.lab.reports.bench import Report
    from stablegen.lab.reports.lab import LabReport

app = typer.Typer()
lab = typer.Typer(help="Measure batch variance on this machine: four experiments.", no_args_is_help=True)
app.add_typer(lab, name="lab")

DeviceName = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtypes = Annotated[
    list[str] | None, typer.Option("--dtype", help="float32, float16 or bfloat16; repeated, or separated by commas.")
]
NumberSeed = Annotated[int, typer.Option(help="Seed of the random numbers.")]
PromptFile = Annotated[
    Path | None, typer.Option(help="File of prompts, JSON lines or text lines; default: stablegen's own 103.")
]
PromptCount = Annotated[
    int | None,
    typer.Option(
        "--count", help="How many of the prompts; default: all of a file, of stablegen's own 48 on a GPU, 24 on a CPU."
    ),
]
FlipTokens = Annotated[int, typer.Option("--tokens", help="The most tokens of an answer.")]


@app.command()
def demo(as_json: AsJson = False) -> None:
    """Show batch variance, the policies without it, and the verdicts, measured on this machine (under a minute)."""
    from stablegen.console.lab.demo import render
    from stablegen.lab.demo import measure

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
        typer.Option(help="Hub name or local directory; default: tiny-gpt2 on a CPU, as with --random on a GPU."),
    ] = None,
    revision: Revision = None,
    random_weights: Annotated[
        bool, typer.Option("--random", help="GPT-2 small's shape with random weights, without a download.")
    ] = False,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, float16 or bfloat16; repeated, or separated by commas.")
    ] = None,
    batch: Annotated[list[str] | None, typer.Option(help="Batch sizes; repeated, or separated by commas.")] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of each prompt.")] = None,
    tokens: Annotated[int | None, typer.Option(help="New tokens of each call.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Measured runs of each arm; default: 5.")] = None,
    arms: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(arm_names())}; default: all, the slow ones at batch 1 alone."),
    ] = None,
    prefill: Annotated[
        str | None, typer.Option(help="Prompts and their tokens of the prefill, such as 16x512; 0: no prefill.")
    ] = None,
    golden: Annotated[int | None, typer.Option(help="Prompts of the golden set; 0: no golden set.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    plot: Annotated[Path | None, typer.Option(help="Draw the step times to this .png, .svg or .pdf file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON to this file as well, after each table.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what each policy costs on this machine, against transformers and against the speed of the memory.

    Defaults suit the device: on a GPU float32 and a 16-bit dtype, batches 1, 8, 32, 64, 256, prompts of 32 tokens and
    128 new tokens, a prefill of 16x512 and a golden set of 1000; on a CPU a small part of that.
    """
    from stablegen.lab.plot import check_plot, draw

    sizes = whole("--batch", batch)
    if plot is not None:
        check_plot(plot)
    from stablegen.console.lab.bench import render
    from stablegen.lab.bench import measure
    from stablegen.lab.bench_plan import Options

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
    count: Annotated[int, typer.Option(help="How many random numbers to add, a power of two.")] = 4096,
    seed: NumberSeed = 0,
    device: DeviceName = "auto",
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Add the same numbers in several orders, which gives several results."""
    with _experiment("associativity", html, as_json=as_json) as (progress, show):
        from stablegen.lab.associativity import measure

        show(measure(device=device, count=count, seed=seed, progress=progress("dtypes")))


@lab.command()
def matmul(
    shape: Annotated[str, typer.Option(help="M x N x K of the product.")] = "512x512x512",
    batch: Annotated[list[str] | None, typer.Option(help="Numbers of matrices; default: 1 to 10, 100, 1000.")] = None,
    rows: Annotated[list[str] | None, typer.Option(help="Numbers of rows; default: 1 to 512.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="float32, tf32, float16, bfloat16; default: all.")] = None,
    search: Annotated[bool, typer.Option(help="Search for other shapes whose product moves.")] = True,
    seed: NumberSeed = 0,
    device: DeviceName = "auto",
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Multiply two matrices alone and in larger calls, by the vendor's libraries and by stablegen's kernels."""
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
    random_weights: Annotated[bool, typer.Option("--random", help="GPT-2 small's shape with random weights.")] = False,
    dtype: Dtypes = None,
    batch: Annotated[list[str] | None, typer.Option(help="Batch sizes; default: 2 to 64.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of the sequence.")] = 32,
    seed: NumberSeed = 0,
    device: DeviceName = "auto",
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Compare each layer of a transformer for one sequence, alone and in batches."""
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
    batch: Annotated[list[str] | None, typer.Option(help="Batch sizes; default: 1 to 32.")] = None,
    baseline: Annotated[int, typer.Option(help="The batch size with which others are compared.")] = 2,
    padding: Annotated[list[str] | None, typer.Option(help="Tokens of padding; default: 1, 16, 64.")] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help=f"Policies to compare; default: {', '.join(one.spec for one in promising_policies())}."),
    ] = None,
    tokens: FlipTokens = 8,
    prompts: PromptFile = None,
    count: PromptCount = None,
    device: DeviceName = "auto",
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Answer prompts in many batches: which answers flip, by which cause, and that none does under the policies."""
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
    """Run all four experiments, and make one report."""
    with _experiment(None, html, as_json=as_json) as (progress, show):
        from stablegen.lab.experiments import measure

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
    files: Annotated[list[Path], typer.Argument(help="Files that --json printed.")],
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Join reports of experiments, or of `flips` in several dtypes, into one."""
    from stablegen.lab.reports.lab import join as joined
    from stablegen.lab.reports.lab import read_report

    _show_lab(joined([read_report(file) for file in files]), html, as_json=as_json)


@contextmanager
def _experiment(
    name: str | None, html: Path | None, *, as_json: bool
) -> Iterator[tuple[Callable[[str], Callable[[int, int], None] | None], Callable[[Any], None]]]:
    """Yield a function that shows progress, and one that takes the report of the experiment ``name``, or of all."""
    from stablegen.lab.reports.lab import report_of
    from stablegen.pages.render import check_page

    if html is not None:
        check_page(html)
    found: list[Any] = []
    with contextlib.ExitStack() as bars:

        def progress(what: str) -> Callable[[int, int], None] | None:
            bars.close()  # the previous experiment has finished
            return bars.enter_context(progress_bar(what))

        yield progress, found.append
    _show_lab(found[0] if name is None else report_of(**{name: found[0]}), html, as_json=as_json)


def _show_lab(report: LabReport, html: Path | None, *, as_json: bool) -> None:
    from stablegen.console.lab import render

    if as_json:
        print(report.model_dump_json())
    else:
        render(report, new_console())
    if html is not None:
        from stablegen.pages.lab import write

        write(report, html)
    if report.problems:
        raise typer.Exit(1)
