"""The guard: calibrate, audit, report, doctor."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from stablegen.cli.options import App, AsJson, CacheDir, Device, Dtype, Model, PageFile, Policy, Revision
from stablegen.cli.shared import make_client, new_console, opened_output, progress_bar, read_input, text_of
from stablegen.core.policy import control_policy

app = typer.Typer()


@app.command()
def calibrate(
    model: Model = None,
    revision: Revision = None,
    dtype: Dtype = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="POLICY/DTYPE that generates the answers, by default the control policy in the dtype of --to; or "
            "'cache' for the answers in the cache, whatever their numerics.",
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--to", help="POLICY/DTYPE that scores them again; by default that of the settings.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts, JSON lines or text lines; by default a built-in set.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each answer.")] = 64,
    device: Device = None,
    app_name: App = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Measure how far margins move between two numerics; the guard then judges hits by it."""
    import tempfile

    from stablegen.lab.prompts import SAMPLE

    asked = list(SAMPLE) if prompts is None else [text_of(line) for line in read_input(None, prompts)]
    policy, dtype = _pair("--to", target, None, dtype)
    with contextlib.ExitStack() as stack:
        scoring = make_client(model, policy, dtype, device, app_name, cache_dir, revision=revision)
        stack.enter_context(scoring)
        with progress_bar("answers") as progress:
            if source == "cache":
                mine = [record for record in scoring.cache.records() if scoring.answers_for(record)]
                found = scoring.calibrate(mine, progress=progress)
            else:
                policy, dtype = _pair("--from", source, control_policy().spec, scoring.numerics.dtype)
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stablegen-")))
                answering = make_client(model, policy, dtype, device, app_name, folder, revision=revision)
                stack.enter_context(answering)
                found = scoring.calibrate_from(answering, asked, max_new_tokens=max_new_tokens, progress=progress)
    for one in found:
        if as_json:
            print(one.model_dump_json())
            continue
        print(f"{one.model.name}: {one.recorded.summary()} -> {one.current.summary()}")
        print(f"    {one.basis}: {one.flips} steps flipped, {one.tie_flips} of {one.ties} ties")
        for share in (0.5, 0.99):
            print(f"    {share:.0%} of margins moved by at most {one.quantile(share):.3g} at a score of 16")
        print(f"    beyond {one.tail_from * 2 ** (4 * one.power):.3g} extrapolated, tail shape {one.tail_shape:.2f}")


def _pair(option: str, given: str | None, policy: str | None, dtype: str | None) -> tuple[str | None, str | None]:
    """Return the policy and the dtype of POLICY/DTYPE; where a part is missing, the default given for it."""
    if given is None:
        return policy, dtype
    parts = given.split("/")
    if len(parts) > 2 or not parts[0]:
        raise typer.BadParameter(f"{option} {given!r} is not POLICY/DTYPE, such as {control_policy()}/bfloat16")
    return parts[0], parts[1] if len(parts) == 2 else dtype


@app.command()
def audit(
    model: Model = None,
    revision: Revision = None,
    policy: Policy = None,
    dtype: Dtype = None,
    device: Device = None,
    app_name: App = None,
    sample: Annotated[
        int | None, typer.Option(help="How many cached answers to audit, chosen at random; by default all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed by which --sample chooses.")] = 0,
    cache_dir: CacheDir = None,
    out: Annotated[Path | None, typer.Option(help="Also write the report as JSON to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Plot predicted against observed divergence to this .png, .svg or .pdf file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Generate cached answers again from scratch, and compare the guard's verdicts with the results.

    Exits with 1 where an answer judged exact was not. No record is changed; the result is stored for `report`.
    """
    from stablegen.console.audit import render
    from stablegen.lab.plot import check_plot, draw_reliability
    from stablegen.reports.audit import audit as run
    from stablegen.reports.audit import keep

    if sample is not None and sample < 1:
        raise typer.BadParameter(f"--sample {sample} is not a whole number of at least 1")
    if plot is not None:
        check_plot(plot)
    with make_client(model, policy, dtype, device, app_name, cache_dir, revision=revision) as client:
        with (
            contextlib.nullcontext() if out is None else opened_output(out) as write,
            progress_bar("answers") as progress,
        ):
            report = run(client, sample=sample, seed=seed, progress=progress)
            if write is not None:
                write(report.model_dump_json(indent=1))
        try:
            keep(report, client)
        finally:  # a full disk, or a pipe that closes, costs one of the two and not both
            if as_json:
                print(report.model_dump_json())
            else:
                render(report, new_console())
            if plot is not None:
                draw_reliability(report, plot)
    if report.broken:
        raise typer.Exit(1)


@app.command()
def report(
    model: Model = None,
    revision: Revision = None,
    policy: Policy = None,
    dtype: Dtype = None,
    device: Device = None,
    app_name: App = None,
    cache_dir: CacheDir = None,
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Report on the whole cache: verdicts, margins, the most fragile answers, and what each policy would do."""
    from stablegen.console.cache import render
    from stablegen.reports.cache import survey

    if html is not None:
        from stablegen.pages.render import check_page

        check_page(html)
    made = make_client(model, policy, dtype, device, app_name, cache_dir, revision=revision)
    with made as client, progress_bar("answers") as progress:
        found = survey(client, progress=progress)
    if html is not None:
        from stablegen.pages.cache import write_cache

        write_cache(found, html)
    if as_json:
        print(found.model_dump_json())
    else:
        render(found, new_console())


@app.command()
def doctor(
    model: Model = None,
    revision: Revision = None,
    policy: Policy = None,
    dtype: Dtype = None,
    device: Device = None,
    app_name: App = None,
    cache_dir: CacheDir = None,
) -> None:
    """Load the model, check whether the policy keeps its promise here, and show every stored self-check."""
    import stablegen

    with make_client(model, policy, dtype, device, app_name, cache_dir, revision=revision) as client:
        print(f"stablegen {stablegen.__version__}, cache {client.cache.where}")
        for name, value in client.numerics.model_dump(exclude_none=True).items():
            print(f"{name:>24}  {value}")
        now = client.self_check()
        for check in client.cache.self_checks():
            shape = check.shape.describe()
            kept = "kept" if check.passed else "BROKEN"
            print(f"{kept}: {check.numerics.summary()}{', ' if shape else ''}{shape}")
            for name, result in check.checks.items():
                print(f"    {name}: {result}")
            if check.passed and check.shape.width is not None and not check.slot_free:
                print("    so each request runs in slot 0 of a batch of its own")
        if not client.policy.promises:
            print(f"policy {client.policy} promises nothing; hits under it are judged by their margins")
        elif not now.passed:
            print(f"policy {client.policy} does not keep its promise here: no hit under it is judged exact")
            raise typer.Exit(1)
