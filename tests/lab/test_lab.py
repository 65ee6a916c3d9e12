"""The lab: what each experiment compares, that its control differs, and that stablegen's own kernels do not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support import TINY, save, small_directory, small_llama

from stablegen import cli
from stablegen.errors import DeviceError, DeviceMemoryError, InputFileError, ParameterError, PolicyError
from stablegen.kernels.reference import ReferenceKernels
from stablegen.lab import associativity, flips, layers, matmul
from stablegen.lab.bits import same_bits
from stablegen.lab.report import LabReport, join, read_report, render, report_of
from stablegen.lab.tables import counts_text, grouped


def run(*arguments: str) -> int:
    """Run the command; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["stablegen", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
    assert isinstance(left.value.code, int)
    return left.value.code


# --- associativity ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sums() -> associativity.AssociativityReport:
    return associativity.measure(device="cpu", count=1024)


def test_three_numbers_add_up_otherwise_from_the_right(sums: associativity.AssociativityReport) -> None:
    found = {(one.dtype, one.a): (one.from_left, one.from_right) for one in sums.triples}
    assert found["float64", 1e16] == (1.0, 0.0)
    assert found["float32", float(torch.tensor(1e16))] == (1.0, 0.0)
    assert found["float16", 3e4] == (1.0, 0.0)
    assert all(map(math.isnan, found["float16", math.inf]))
    assert {one.dtype for one in sums.triples if one.differs} == {"float16", "bfloat16", "float32", "float64"}


def test_every_dtype_gives_several_results_all_near_the_exact_one(sums: associativity.AssociativityReport) -> None:
    for one in sums.sums:
        digits = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}[one.dtype]
        assert one.results > 1, one.dtype
        assert one.spread > 0
        assert max(found.error for found in one.sums) < 1024 * 64 * 2.0**-digits


def test_orders_are_what_they_say() -> None:
    big = torch.tensor([1e8, 1.0, -1e8, 1.0])
    assert associativity.one_by_one(big[None]).tolist() == [1.0]
    assert associativity.halving(big).item() == 2.0
    assert associativity.one_by_one(torch.tensor([[1.0, 1e8, 1.0, -1e8]])).tolist() == [0.0]


@pytest.mark.parametrize("count", [0, 100, 1000, -256])
def test_a_sum_of_no_power_of_two_is_refused(count: int) -> None:
    with pytest.raises(ParameterError, match="a power of two"):
        associativity.measure(device="cpu", count=count)


# --- matmul -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def products() -> matmul.MatmulReport:
    return matmul.measure(
        shape=(32, 256, 512),
        batches=(1, 2, 3),
        rows=(1, 2, 16, 32),
        precisions=("float32", "tf32"),
        device="cpu",
        search=False,
    )


def test_stablegens_kernels_give_the_same_bits_in_any_company(products: matmul.MatmulReport) -> None:
    own = [one for one in products.companies if one.kernels == "stablegen"]
    assert {(one.way, one.count) for one in own} == {
        *(("stacked", count) for count in (1, 2, 3)),
        *(("row", count) for count in (1, 2, 16, 32)),
    }
    assert all(one.equal and one.max_abs == one.l2 == 0.0 and one.allclose for one in own)


def test_the_vendors_row_moves_in_company_here(products: matmul.MatmulReport) -> None:
    rows = [one for one in products.companies if (one.kernels, one.way) == ("vendor", "row")]
    assert rows[0].equal  # one row is the row alone
    assert any(not one.equal and one.max_abs and one.l2 and one.l2 >= one.max_abs for one in rows)


def test_a_precision_that_cannot_be_had_is_named(products: matmul.MatmulReport) -> None:
    assert set(products.unavailable) == {"tf32"}
    assert {one.precision for one in products.companies} == {"float32"}


def test_torchs_flag_is_put_back() -> None:
    before = torch.get_float32_matmul_precision()
    matmul.measure(shape=(8, 8, 8), batches=(1,), rows=(1,), precisions=("float32",), device="cpu", search=False)
    assert torch.get_float32_matmul_precision() == before


def test_products_that_would_take_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "LIMIT", 0.0)
    found = matmul.measure(
        shape=(8, 8, 8), batches=(2,), rows=(1,), precisions=("float32",), device="cpu", search=False
    )
    vendor = [one for one in found.companies if one.kernels == "vendor" and one.way != "row"]
    assert all(one.problem and "would take about" in one.problem for one in vendor)
    assert all(one.equal is None for one in vendor)


def test_products_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_fitting", lambda *_: 2)
    found = matmul.measure(
        shape=(8, 8, 8), batches=(2, 3), rows=(1,), precisions=("float32",), device="cpu", search=False
    )
    problems = {(one.count, one.problem) for one in found.companies if one.way == "batched"}
    assert problems == {(2, None), (3, "does not fit into memory")}


def test_the_search_finds_what_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matmul.SEARCHED, "cpu", ((4, 256, 512),))
    found = matmul.measure(shape=(8, 8, 8), batches=(1,), rows=(1,), precisions=("float32",), device="cpu")
    by_way = {one.way: one for one in found.searched}
    assert set(by_way) == set(matmul.WAYS)
    row = by_way["row"]
    assert row.first in row.counts
    assert row.max_abs > 0 and row.moved <= len(row.counts)


def test_a_product_sums_up_what_a_kernel_set_leaves_apart() -> None:
    kernels = ReferenceKernels()
    weight, x = torch.randn(16, 8), torch.randn(3, 16)
    layer = kernels.prepare(weight, None)
    whole = matmul.product(kernels, x, layer)
    torch.testing.assert_close(whole, x @ weight)


def test_bits_are_compared_and_not_numbers() -> None:
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([math.nan]), torch.tensor([math.nan]))


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("ampere_sgemm_32x32_sliced1x4_nn", "ampere_sgemm_32x32_sliced1x4_nn"),
        ("void cutlass::Kernel2<cutlass_80_sgemm_128x32>(cutlass_80_sgemm_128x32::Params)", "cutlass_80_sgemm_128x32"),
        (
            "void splitKreduce_kernel<32, int, float>(cublasSplitKParams<float>, float const*)",
            "splitKreduce_kernel",
        ),
        ("std::enable_if<!(false), void>::type gemvx::kernel<int, P<A<float>, B> >(P<int>)", "gemvx::kernel"),
    ],
)
def test_a_kernel_is_called_by_its_own_name(name: str, short: str) -> None:
    assert matmul.short_name(name) == short


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"shape": (8, 8)}, "shape=8,8"),
        ({"shape": (8, 0, 8)}, "shape=8,0,8"),
        ({"batches": ()}, "batch="),
        ({"rows": (0,)}, "rows=0"),
        ({"precisions": ("float8",)}, "precision 'float8'"),
        ({"precisions": ()}, "precision ''"),
    ],
)
def test_sizes_that_are_none_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        matmul.measure(device="cpu", **given)


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def streams() -> layers.LayersReport:
    return layers.measure(dtypes=("float32",), batches=(2, 4), length=5, device="cpu")


def test_every_half_of_every_layer_is_looked_at(streams: layers.LayersReport) -> None:
    names = [
        layers.EMBEDDING,
        *(name for i in range(6) for name in (layers.attention_of(i), layers.mlp_of(i))),
        "scores",
    ]
    assert len(streams.runs) == 2 * 2 * 2  # kernels, batches, stages
    for one in streams.runs:
        assert [layer.layer for layer in one.layers] == names
        assert all(layer.largest > 0 for layer in one.layers)


def test_transformers_moves_and_stablegen_does_not(streams: layers.LayersReport) -> None:
    moved = {
        kernels: [one for one in streams.runs if one.kernels == kernels and one.first]
        for kernels in ("vendor", "stablegen")
    }
    assert moved["vendor"]
    assert not moved["stablegen"]
    run = moved["vendor"][-1]
    assert run.worst is not None
    assert run.worst.max_abs == max(one.max_abs for one in run.layers[:-1])


def test_both_look_at_the_same_numbers() -> None:
    """The stream through stablegen's kernels is transformers' own, but for rounding."""
    from stablegen.lab.subject import load_subject
    from stablegen.machine.digests import DigestMemory
    from stablegen.machine.plan import find_device
    from stablegen.sources.checkpoint import open_checkpoint

    subject = load_subject(open_checkpoint(None, None, DigestMemory(None)), find_device("cpu", "float32"), "float32")
    sequences = layers._sequences(subject, 5, 3, 0)
    mine, theirs = layers._Own(subject, 3, 5).run(sequences), layers._Native(subject).run(sequences)
    for stage in ("prefill", "decode"):
        for layer, value in mine[stage].items():
            other = theirs[stage][layer]
            if value.shape != other.shape:  # of the last layer only what chooses is computed
                assert layer == layers.mlp_of(5)
                other = other[-1:]
            torch.testing.assert_close(value, other.reshape(value.shape), rtol=1e-3, atol=1e-3)


def test_a_model_that_stablegens_kernels_do_not_run(tmp_path: Path) -> None:
    found = layers.measure(
        model=str(save(small_llama(), tmp_path)), dtypes=("float32",), batches=(2,), length=4, device="cpu"
    )
    assert "its kernels run GPT-2, and this is a llama" in found.unavailable["stablegen"]
    assert [one.layer for one in found.runs[0].layers][:3] == ["embedding", "0 attention", "0 MLP"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batches": ()}, "batch="),
        ({"batches": (1, 2)}, "batch=1,2"),
        ({"length": 0}, "length=0"),
        ({"length": 5000}, "length=5000"),
        ({"model": "gpt2", "random_weights": True}, "together with random weights"),
    ],
)
def test_layers_that_cannot_be_measured(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        layers.measure(dtypes=("float32",), device="cpu", **given)


# --- flips ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flipped() -> flips.FlipsReport:
    return flips.measure(
        dtypes=("bfloat16",),
        batches=(1, 2, 3),
        pads=(1, 16),
        tokens=10,
        count=3,
        policies=("single", "padded:4", "invariant"),
        device="cpu",
    )


def test_there_are_103_prompts_and_the_articles_comes_first() -> None:
    prompts = flips.own_prompts()
    assert len(prompts) == len(set(prompts)) == 103
    assert prompts[0] == "Tell me about yourself.\nanswer : "


def test_the_causes_are_told_apart(flipped: flips.FlipsReport) -> None:
    (found,) = flipped.dtypes
    totals = {(total.cause, total.setting): total for total in found.totals}
    assert list(totals) == [
        *(("batch size", rows) for rows in (1, 3)),
        *(("padding", pad) for pad in (1, 16)),
        *(("missing mask", pad) for pad in (1, 16)),
        *(("as they come", rows) for rows in (1, 3)),
    ]
    assert all(total.prompts == 3 and total.steps <= 30 for total in totals.values())
    # another text moves scores by more than any rounding, at every step
    mistake, rounding = totals["missing mask", 16], totals["padding", 16]
    assert mistake.flipped == 3
    assert mistake.moved_steps == mistake.steps
    assert mistake.largest > 4 * rounding.largest
    assert rounding.moved_steps or totals["padding", 1].moved_steps  # the control differs


def test_the_policies_move_nothing(flipped: flips.FlipsReport) -> None:
    (found,) = flipped.dtypes
    assert [(one.policy, one.batch) for one in found.policies] == [
        (policy, batch) for policy in ("single", "padded:4", "invariant") for batch in (1, 3)
    ]
    assert all(one.steps > 0 and one.flipped == one.moved_steps == 0 for one in found.policies)
    assert "0 of" in flipped.meaning


def test_a_flip_is_shown_with_its_two_tables(flipped: flips.FlipsReport) -> None:
    for prompt in flipped.dtypes[0].prompts:
        assert len({flip.cause for flip in prompt.shown}) == len(prompt.shown)
        for flip in prompt.shown:
            trial = next(one for one in prompt.trials if (one.cause, one.setting) == (flip.cause, flip.setting))
            assert flip.step == trial.flips[0]
            assert len(flip.baseline) == len(flip.other) == flips.TOP
            assert flip.baseline[0].token != flip.other[0].token
            for table in (flip.baseline, flip.other):
                scores = [one.score for one in table]
                assert scores == sorted(scores, reverse=True)
            assert flip.margin == pytest.approx(flip.baseline[0].score - flip.baseline[1].score)


def test_a_trial_is_led_along_the_baselines_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that flips does not drag the others along: where every other step is the same, so is what went before."""
    followed = []
    real = flips._Native._run

    def watched(self: Any, requests: Any, along: Any = None) -> Any:
        found = real(self, requests, along)
        followed.append((along, found.trace.tokens))
        return found

    monkeypatch.setattr(flips._Native, "_run", watched)
    flips.measure(
        model=str(small_directory()),
        dtypes=("float32",),
        batches=(1, 2),
        pads=(8,),
        tokens=6,
        count=1,
        policies=(),
        device="cpu",
    )
    free = [tokens for along, tokens in followed if along is None]
    assert len(free) == 2
    assert all(len(tokens) == len(along) and along in free for along, tokens in followed if along is not None)


def test_the_mistake_is_padding_read_as_text() -> None:
    set_up, subject = _set_up()
    batches = {(cause, setting): requests for cause, setting, requests in set_up.trials(subject)}
    padded, mistaken = batches["padding", 8], batches["missing mask", 8]
    assert padded[0].prompt_ids == subject.ids
    assert mistaken[0].prompt_ids == (0,) * 8 + subject.ids
    assert {len(request.prompt_ids) for request in mistaken} == {len(subject.ids) + 8}
    assert len(padded) == len(mistaken) == 2
    assert {len(request.prompt_ids) for request in batches["batch size", 3]} == {len(subject.ids)}


def _set_up() -> tuple[flips._SetUp, flips._Subject]:
    from stablegen.machine.digests import DigestMemory
    from stablegen.machine.plan import find_device
    from stablegen.sources.checkpoint import open_checkpoint
    from stablegen.tokenizer import Tokenizer

    memory = DigestMemory(None)
    checkpoint = open_checkpoint(str(TINY), None, memory)
    tokenizer = Tokenizer.from_file(checkpoint.tokenizer_file, memory)
    set_up = flips._SetUp(checkpoint, tokenizer, find_device("cpu", "float32"), 4, 2, (2, 3), (8,))
    (subject,), skipped = set_up.subjects(["Hello there"], None)
    assert not skipped
    return set_up, subject


def test_prompts_that_do_not_fit_are_left_out_and_named() -> None:
    found = flips.measure(
        model=str(small_directory()),
        dtypes=("float32",),
        batches=(1,),
        pads=(),
        tokens=2,
        prompts=["word " * 400, "short"],
        policies=(),
        device="cpu",
    )
    assert [one.prompt for one in found.dtypes[0].prompts] == ["short"]
    assert "tokens, from 1 to 254 fit" in found.skipped[0]


def test_a_model_that_invariant_does_not_run_is_measured_without_it(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"model": str(save(small_llama(), tmp_path)), "dtypes": ("float32",), "batches": (1, 2)}
    asked |= {"pads": (), "tokens": 2, "count": 1, "device": "cpu"}
    found = flips.measure(**asked)
    assert {one.policy for one in found.dtypes[0].policies} == {"single", "padded:8"}
    assert "invariant" in found.unavailable
    with pytest.raises(PolicyError, match="invariant"):
        flips.measure(policies=("invariant",), **asked)


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"baseline": 1}, ParameterError, "baseline=1"),
        ({"batches": (0,)}, ParameterError, "batch=0"),
        ({"pads": (0,)}, ParameterError, "padding=0"),
        ({"tokens": 0}, ParameterError, "tokens=0"),
        ({"tokens": 5000}, ParameterError, "tokens=5000"),
        ({"prompts": []}, ParameterError, "0 prompts"),
        ({"count": 0}, ParameterError, "of them 0"),
        ({"policies": ("native",)}, PolicyError, "native"),
        ({"policies": ("padded",)}, PolicyError, "padded"),
        ({"device": "tpu"}, DeviceError, "tpu"),
        ({"prompts": ["word " * 4000]}, ParameterError, "none of the 1 prompts"),
    ],
)
def test_flips_that_cannot_be_measured(given: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        flips.measure(**({"device": "cpu"} | given))


# --- reports ----------------------------------------------------------------------------------------------------------


def test_a_report_survives_its_json(
    sums: associativity.AssociativityReport,
    products: matmul.MatmulReport,
    streams: layers.LayersReport,
    flipped: flips.FlipsReport,
    tmp_path: Path,
) -> None:
    report = report_of(associativity=sums, matmul=products, layers=streams, flips=flipped)
    (tmp_path / "all.json").write_text(report.model_dump_json())
    again = read_report(tmp_path / "all.json")
    assert again.model_dump_json() == report.model_dump_json()
    console = Console(width=160, record=True)
    with console.capture() as printed:
        render(again, console)
    text = printed.get()
    for word in ("(a + b) + c", "slice 0 of bmm", "worst layer", "missing mask", "padded:4", "measured in"):
        assert word in text


def test_reports_of_runs_apart_are_joined(sums: associativity.AssociativityReport, flipped: flips.FlipsReport) -> None:
    other = flipped.model_copy(update={"dtypes": (flipped.dtypes[0].model_copy(update={"dtype": "float16"}),)})
    found = join([report_of(associativity=sums), report_of(flips=flipped), report_of(flips=other)])
    assert found.associativity == sums
    assert found.flips is not None
    assert [one.dtype for one in found.flips.dtypes] == ["bfloat16", "float16"]
    with pytest.raises(ParameterError, match="twice"):
        join([report_of(flips=flipped), report_of(flips=flipped)])
    with pytest.raises(ParameterError, match="associativity was run 2 times"):
        join([report_of(associativity=sums), report_of(associativity=sums)])
    with pytest.raises(ParameterError, match="several models"):
        join([report_of(flips=flipped), report_of(flips=other.model_copy(update={"tokens": 99}))])
    with pytest.raises(ParameterError, match="no experiment"):
        join([LabReport(created=0.0)])


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"created": "x"}'])
def test_a_file_that_holds_no_report(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputFileError, match="holds no report"):
        read_report(tmp_path / "x.json")
    with pytest.raises(InputFileError, match="cannot be read"):
        read_report(tmp_path / "none.json")


def test_neighbours_that_say_the_same_become_one_row() -> None:
    rows = [("a", 1, "x"), ("a", 2, "x"), ("a", 3, "y"), ("b", 4, "y"), ("a", 5, "y")]
    assert grouped(rows) == [("a", "1, 2", "x"), ("a", "3", "y"), ("b", "4", "y"), ("a", "5", "y")]
    assert counts_text([1, 2, 3, 4]) == "1 ... 4"
    assert counts_text([2, 3, 4, 5, 9, 10], among=[1, 2, 3, 4, 5, 9, 10, 100]) == "2 ... 10"
    assert counts_text([2, 3, 5, 9], among=[1, 2, 3, 4, 5, 9]) == "2, 3, 5, 9"


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_json_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "sums.html"
    assert run("lab", "associativity", "--count", "256", "--device", "cpu", "--json", "--html", str(page)) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["associativity"]["sums"][0]["count"] == 256
    assert "Adding up is not associative" in page.read_text()


def test_the_command_for_products_and_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--shape", "8x8x8", "--batch", "1,2", "--rows", "1", "--precision", "float32", "--no-search")
    assert run("lab", "matmul", *sizes, "--device", "cpu") == 0
    assert "8 x 8 times 8 x 8" in capsys.readouterr().out
    chosen = ("--model", str(small_directory()), "--dtype", "float32", "--batch", "2", "--length", "3")
    assert run("lab", "layers", *chosen, "--device", "cpu") == 0
    assert "worst layer" in capsys.readouterr().out


def test_the_command_for_flips_takes_a_file_of_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("One day\nHello\n")
    chosen = ("--model", str(small_directory()), "--dtype", "float32", "--batch", "1,2", "--padding", "4")
    asked = ("--policy", "single", "--tokens", "3", "--prompts", str(tmp_path / "prompts.txt"), "--device", "cpu")
    assert run("lab", "flips", *chosen, *asked) == 0
    assert "float32: 2 prompts under native, against 2 rows" in capsys.readouterr().out


def test_the_command_for_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], sums: Any, products: Any
) -> None:
    calls = {}

    def quick(name: str, found: Any) -> Any:
        def measure(**asked: Any) -> Any:
            calls[name] = asked
            return found

        return measure

    monkeypatch.setattr(associativity, "measure", quick("associativity", sums))
    monkeypatch.setattr(matmul, "measure", quick("matmul", products))
    monkeypatch.setattr(layers, "measure", quick("layers", None))
    monkeypatch.setattr(flips, "measure", quick("flips", None))
    page = tmp_path / "all.html"
    assert run("lab", "all", "--tokens", "3", "--dtype", "float32", "--seed", "5", "--html", str(page)) == 0
    assert "associativity" in capsys.readouterr().out
    assert calls["flips"]["tokens"] == 3
    assert calls["layers"]["dtypes"] == ["float32"]
    assert calls["matmul"]["seed"] == 5
    assert page.exists()


def test_what_fails_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], sums: Any, products: Any
) -> None:
    def full(**_: Any) -> Any:
        raise DeviceMemoryError("a batch of 64 rows did not fit")

    monkeypatch.setattr(associativity, "measure", lambda **_: sums)
    monkeypatch.setattr(matmul, "measure", lambda **_: products)
    monkeypatch.setattr(layers, "measure", full)
    monkeypatch.setattr(flips, "measure", full)
    page = tmp_path / "all.html"
    assert run("lab", "all", "--html", str(page)) == 1
    printed = capsys.readouterr().out
    assert "layers failed: a batch of 64 rows did not fit." in printed
    assert "(a + b) + c" in printed
    assert "a batch of 64 rows did not fit" in page.read_text()
    monkeypatch.setattr(associativity, "measure", full)
    monkeypatch.setattr(matmul, "measure", full)
    assert run("lab", "all", "--html", str(page)) == 1
    assert "a batch of 64 rows did not fit" in capsys.readouterr().err


def test_a_batch_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(layers._Native, "run", full)
    with pytest.raises(DeviceMemoryError, match="a batch of 1 rows did not fit"):
        layers.measure(dtypes=("float32",), device="cpu")


def test_the_command_joins_reports(
    tmp_path: Path, sums: Any, products: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(report_of(associativity=sums).model_dump_json())
    (tmp_path / "b.json").write_text(report_of(matmul=products).model_dump_json())
    assert run("lab", "join", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["associativity"] and content["matmul"] and content["flips"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("lab", "associativity", "--html", "x.pdf"), 2, "ends in .html"),
        (("lab", "associativity", "--count", "3"), 2, "a power of two"),
        (("lab", "matmul", "--shape", "8x8"), 2, "3 whole numbers"),
        (("lab", "matmul", "--shape", "axbxc"), 2, "not a whole number"),
        (("lab", "matmul", "--batch", "one"), 2, "not a whole number"),
        (("lab", "layers", "--dtype", "float8"), 2, "float8"),
        (("lab", "flips", "--policy", "twice"), 2, "unknown policy"),
        (("lab", "flips", "--prompts", "nothing.txt"), 2, "cannot be read"),
        (("lab", "join", "nothing.json"), 1, "cannot be read"),
    ],
)
def test_wrong_usage_says_what_is_wrong(
    arguments: tuple[str, ...], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == code
    assert said in capsys.readouterr().err
