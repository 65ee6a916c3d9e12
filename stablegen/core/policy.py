"""Execution policies: in which batches requests run. Planning is pure; it sees lengths, never tokens.

The shape in which a request runs is a function of that request alone, never of what else is waiting. ``native`` is
the control: it batches whatever is waiting, as transformers would, and promises nothing.

A policy defines all that is specific to it: its spelling, the family of engines that runs it, what it promises, and
what its self-check compares. ``register_policy`` makes a class known; nothing else in this package names a policy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self, TypeVar

from stablegen.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stablegen.core.request import Request

BUCKET = 64
"""Widths of padded batches are multiples of this many tokens."""
CAPACITY_STEP = 256
"""Capacities of KV caches of fixed length are multiples of this many tokens."""
MAX_PADDED_ROWS = 4096
TRANSFORMERS = "transformers"
"""The family of engines that run an unchanged transformers model."""
BATCH_INVARIANT = "batch-invariant"
"""The family of engines that run their own forward pass, through batch-invariant kernels."""
ENTRY_POINTS = "stablegen.policies"
"""The group of entry points by which other packages add policies: each names a module that registers one."""
REPEATED, BESIDE, SLOT = "repeated", "beside other rows", "in another slot"
"""What a self-check compares."""
STEPS = 4
"""Tokens that a self-check generates for each request."""
_NEEDLES = (21, 130)
"""Prompt lengths of the requests whose bits are compared, in tokens: within one block of keys, and over several."""
_LONG = 520
"""Tokens of the long prompts that run in one pass with the compared request."""
_SHORT = tuple(1 + 7 * i % 32 for i in range(15))
"""Prompt lengths of the requests before and after it."""
_CROWD = 100
"""Rows around it, if that many run at once: as they finish, its passes have more than 64, 32 and 16 rows."""


class Shape(NamedTuple):
    """What a policy fixes for one request, whatever else is waiting; requests of one shape may share a batch.

    ``width`` is the padded length of the prompt in tokens; None where prompts are not padded to a common width, or
    only to the longest of them. ``capacity`` is the length of the KV cache in tokens; None where it grows with the
    answer. ``scored``: where continuations are scored, the number of positions at the end whose scores are computed; 0
    where that is each continuation's own length, None where nothing is scored.
    """

    width: int | None = None
    capacity: int | None = None
    scored: int | None = None

    def describe(self) -> str:
        """Return what it fixes in words, '' where it fixes nothing."""
        return ", ".join(f"{name} {value}" for name, value in self._asdict().items() if value is not None)


ANY_SHAPE = Shape()
"""The shape that fixes nothing."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that run together in one shape: a request, or None for a filler row."""

    rows: tuple[Request | None, ...]
    shape: Shape = ANY_SHAPE

    @property
    def requests(self) -> list[tuple[int, Request]]:
        """Return (slot, request) of the rows that are not filler."""
        return [(slot, row) for slot, row in enumerate(self.rows) if row is not None]


@dataclass(frozen=True, slots=True)
class Limits:
    """What planning and verifying must know of the engine.

    ``context``: tokens. ``slot_free`` is False where the self-check found that a row's slot changes its bits; then each
    request runs in slot 0 of a padded batch of its own. ``static_cache``: the KV cache has a fixed length, which is
    then part of every batch's shape. ``prefill_equals_decode``: computing an answer's tokens in one pass gives the same
    bits as decoding them one by one. ``rows``: the most requests that run at once; None where there is no limit.
    """

    context: int
    slot_free: bool = True
    static_cache: bool = False
    prefill_equals_decode: bool = False
    rows: int | None = None


class Company(NamedTuple):
    """A batch in which a request must have the bits that it has alone.

    ``compared`` says what is compared; ``anew``: whether the engine first forgets what it has computed.
    """

    compared: str
    batch: Batch
    anew: bool = True


class Trial(NamedTuple):
    """One request of a self-check: its batch alone, and the companies in which its bits must be the same."""

    needle: Request
    alone: Batch
    companies: tuple[Company, ...]


MakeRequest = Callable[[int, int, int], "Request"]
"""Makes a self-check's request of random tokens from a seed, a prompt length and a number of steps, both in tokens."""


def capacity_for(tokens: int) -> int:
    """Return the length of a KV cache for so many tokens, rounded up so that few lengths occur.

    Up to 2048 tokens it is the next multiple of ``CAPACITY_STEP``; beyond, the step doubles with each doubling, so that
    no cache is more than a quarter too long.
    """
    step = max(CAPACITY_STEP, 1 << max(tokens.bit_length() - 3, 0))
    return -(-tokens // step) * step


class ExecutionPolicy(ABC):
    """One way to run requests; ``spec`` is how it is written in settings and on the command line."""

    __slots__ = ()

    name: ClassVar[str]
    """How it is written in settings, or the part before the colon."""
    form: ClassVar[str]
    """How help texts write it: ``padded:N``."""
    accepted: ClassVar[str]
    """How error messages say what is accepted."""
    engines: ClassVar[str] = TRANSFORMERS
    """The family of engines that runs it."""
    promises: ClassVar[bool] = True
    """Whether equal ``Numerics`` imply equal bits under this policy."""
    slot_promised: ClassVar[bool] = True
    """Whether the promise covers a row's slot; where not, and the slot changes bits, every request runs in slot 0."""
    preference: ClassVar[int | None] = None
    """Where no policy is named, the one with the lowest value that the model can run under is used; None: never."""

    @classmethod
    @abstractmethod
    def parse(cls, argument: str | None) -> Self:
        """Return the policy for the text after the colon (None: no colon); raise ``ValueError`` if it is bad."""

    @classmethod
    def typical(cls) -> Self:
        """Return the one that represents its kind in reports."""
        return cls.parse(None)

    @property
    def spec(self) -> str:
        """Return how it is written in settings: ``load_policy(policy.spec) == policy``."""
        return self.name

    @abstractmethod
    def plan(self, requests: Sequence[Request], limits: Limits) -> list[Batch]:
        """Return batches that hold each request once."""

    def width(self, length: int, context: int) -> int | None:
        """Return the padded width in tokens of a prompt of ``length`` tokens; None where nothing is padded."""
        return None

    def shape_of(self, request: Request, limits: Limits) -> Shape:
        """Return the shape in which a request runs."""
        if request.continuation:
            return self.scoring_shape(len(request.given), len(request.continuation), limits)
        return self.shape(len(request.prompt_ids), request.params.max_new_tokens, limits)

    def scoring_shape(self, length: int, scored: int, limits: Limits) -> Shape:
        """Return the shape for scoring ``scored`` tokens, where they and their prompt are ``length`` tokens together.

        Its width may exceed the context, because no row may be full; positions never do.
        """
        width = self.width(length, length + BUCKET)
        return Shape(width, None, 0 if width is None else min(-(-scored // BUCKET) * BUCKET, width))

    def shape(self, length: int, new: int, limits: Limits) -> Shape:
        """Return the shape in which a prompt of ``length`` tokens and at most ``new`` generated ones run."""
        width = self.width(length, limits.context)
        # padding takes up the cache too, so a capacity may exceed the context; positions never do
        return Shape(width, capacity_for((width or length) + new) if limits.static_cache else None)

    def trials(self, make: MakeRequest, shape: Shape, limits: Limits) -> Iterator[Trial]:
        """Yield what a self-check of a shape compares; by default each request with a second run of itself."""
        for seed, length in enumerate(_NEEDLES):
            needle = make(seed, max(1, min(length, limits.context - STEPS)), STEPS)
            alone = Batch((needle,), shape)
            yield Trial(needle, alone, (Company(REPEATED, alone, anew=False),))

    def __str__(self) -> str:
        return self.spec


_Class = TypeVar("_Class", bound=type[ExecutionPolicy])
_REGISTERED: dict[str, type[ExecutionPolicy]] = {}


def register_policy(policy: _Class) -> _Class:
    """Register a class under its ``name``; a decorator. Raise ``PolicyError`` where another class has that name."""
    known = _REGISTERED.setdefault(policy.name, policy)
    if known is not policy:
        raise PolicyError(
            f"two policies are named {policy.name!r}: {known.__qualname__} and {policy.__qualname__}",
            hint="Give the new one another name",
        )
    return policy


def registered_policies() -> tuple[type[ExecutionPolicy], ...]:
    """Return the classes of all policies, in the order of their registration."""
    return tuple(_REGISTERED.values())


def policy_forms(*, promising: bool = False) -> tuple[str, ...]:
    """Return how help texts write the policies; with ``promising``, those that promise equal bits."""
    return tuple(policy.form for policy in _REGISTERED.values() if policy.promises or not promising)


def accepted_policies() -> str:
    """Return the accepted policies as error messages list them."""
    *most, last = (policy.accepted for policy in _REGISTERED.values())
    return f"{', '.join(most)}, or {last}"


def policies_run_by(engines: str) -> str:
    """Return the policies that a family of engines runs, as error messages list them."""
    return ", ".join(repr(policy.form) for policy in _REGISTERED.values() if policy.engines == engines)


def typical_policies() -> tuple[ExecutionPolicy, ...]:
    """Return one policy of each kind, as reports compare them."""
    return tuple(policy.typical() for policy in _REGISTERED.values())


def control_policy() -> ExecutionPolicy:
    """Return the policy that promises nothing, with which the others are compared."""
    return next(policy.typical() for policy in _REGISTERED.values() if not policy.promises)


def default_policy(can_run: Callable[[ExecutionPolicy], bool]) -> ExecutionPolicy:
    """Return the default policy: the most preferred one that ``can_run`` accepts."""
    ranked = [policy for policy in _REGISTERED.values() if policy.preference is not None]
    for policy in sorted(ranked, key=lambda policy: policy.preference or 0):
        if can_run(policy.typical()):
            return policy.typical()
    raise PolicyError("no policy can run this model", accepted=accepted_policies())


def load_policy(spec: str | ExecutionPolicy) -> ExecutionPolicy:
    """Return the policy written as ``spec``; raise ``PolicyError`` for any other text."""
    if isinstance(spec, ExecutionPolicy):
        return spec
    if isinstance(spec, str):
        name, colon, argument = spec.partition(":")
        if name not in _REGISTERED:
            for entry in metadata.entry_points(group=ENTRY_POINTS, name=name):
                entry.load()
        kind = _REGISTERED.get(name)
        if kind is not None:
            try:
                return kind.parse(argument if colon else None)
            except ValueError as error:
                if isinstance(error, PolicyError):
                    raise
    raise PolicyError(f"unknown policy {spec!r}", accepted=accepted_policies())


def keeps_bits(spec: str) -> bool:
    """Return whether a policy promises equal bits; an unknown policy promises nothing."""
    kind = _REGISTERED.get(spec.partition(":")[0])  # every hit asks: nothing is parsed
    return kind is not None and kind.promises


class _Plain(ExecutionPolicy):
    """A policy without an argument."""

    __slots__ = ()

    @classmethod
    def parse(cls, argument: str | None) -> Self:
        """Return it; raise ``ValueError`` for an argument."""
        if argument is not None:
            raise ValueError(argument)
        return cls()


@register_policy
@dataclass(frozen=True, slots=True)
class Single(_Plain):
    """One row, no padding."""

    name = form = "single"
    accepted = "'single'"
    preference = 1

    def plan(self, requests: Sequence[Request], limits: Limits) -> list[Batch]:
        """Return one batch a request."""
        return [Batch((request,), self.shape_of(request, limits)) for request in requests]


@register_policy
@dataclass(frozen=True, slots=True)
class Padded(ExecutionPolicy):
    """Always ``rows`` rows, left-padded to the prompt's own bucket."""

    rows: int

    name = "padded"
    form = "padded:N"
    accepted = f"'padded:N' with N from 1 to {MAX_PADDED_ROWS}"
    slot_promised = False

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= MAX_PADDED_ROWS:
            raise PolicyError(f"policy {self.spec!r} asks for {self.rows} rows", accepted=accepted_policies())

    @classmethod
    def parse(cls, argument: str | None) -> Self:
        """Return the policy with that many rows."""
        if argument is None or not argument.isdecimal() or not argument.isascii() or len(argument) > 9:
            raise ValueError(argument)
        return cls(int(argument))

    @classmethod
    def typical(cls) -> Self:
        """Return the policy with eight rows."""
        return cls(8)

    @property
    def spec(self) -> str:
        """Return ``padded:N``."""
        return f"{self.name}:{self.rows}"

    def width(self, length: int, context: int) -> int:
        """Return the next multiple of ``BUCKET`` above ``length``, or the context.

        It always exceeds the prompt: transformers drops the mask of a batch of full rows, and would then run another
        attention kernel than for the same row beside a shorter one.
        """
        return min((length // BUCKET + 1) * BUCKET, context)

    def plan(self, requests: Sequence[Request], limits: Limits) -> list[Batch]:
        """Return batches of one shape each, incomplete ones filled up with filler rows."""
        buckets: dict[Shape, list[Request]] = {}
        for request in requests:
            buckets.setdefault(self.shape_of(request, limits), []).append(request)
        batches = []
        real = self.rows if limits.slot_free else 1
        for shape, members in sorted(buckets.items(), key=lambda item: _sortable(item[0])):
            for start in range(0, len(members), real):
                group = members[start : start + real]
                batches.append(Batch((*group, *[None] * (self.rows - len(group))), shape))
        return batches

    def trials(self, make: MakeRequest, shape: Shape, limits: Limits) -> Iterator[Trial]:
        """Yield one request alone among filler rows, beside up to seven others, and in other slots."""
        assert shape.width is not None
        steps = STEPS if shape.capacity is None else min(STEPS, shape.capacity - shape.width + 1)
        longest = min(shape.width, limits.context - steps) - 1
        shortest = max(1, longest - BUCKET + 2)
        needle, *others = [
            make(seed, max(shortest, longest - 11 * seed % BUCKET), steps) for seed in range(1, min(self.rows, 8) + 1)
        ]
        filler = (None,) * (self.rows - 1 - len(others))
        companies = [Company(BESIDE, Batch((needle, *others, *filler), shape))]
        if self.rows > 1:
            companies.append(Company(SLOT, Batch((*others, *filler, needle), shape)))
        if self.rows > 2:
            companies.append(Company(SLOT, Batch((*filler, *others[:1], needle, *others[1:]), shape)))
        yield Trial(needle, Batch((needle, *[None] * (self.rows - 1)), shape), tuple(companies))


@register_policy
@dataclass(frozen=True, slots=True)
class Invariant(_Plain):
    """Any batch, through batch-invariant kernels."""

    name = form = "invariant"
    accepted = "'invariant'"
    engines = BATCH_INVARIANT
    preference = 0

    def scoring_shape(self, length: int, scored: int, limits: Limits) -> Shape:
        """Return the only shape: one pass over tokens gives the same bits as decoding them."""
        return Shape()

    def plan(self, requests: Sequence[Request], limits: Limits) -> list[Batch]:
        """Return everything as one batch: the engine runs what fits, and composition cannot matter."""
        return [Batch(tuple(requests))] if requests else []

    def trials(self, make: MakeRequest, shape: Shape, limits: Limits) -> Iterator[Trial]:
        """Yield each request alone, repeated, beside long and short ones, in other slots, and in a crowd."""
        longest = max(1, limits.context - STEPS)
        # where the context is short, several prompts make the pass long
        long = [make(200 + i, min(_LONG, longest), STEPS) for i in range(-(-_LONG // longest))]
        short = [make(100 + i, min(length, longest), STEPS) for i, length in enumerate(_SHORT)]
        crowd: list[Request] = []
        if limits.rows is not None and limits.rows > len(short) + 1:
            crowd = [make(300 + i, min(1 + i % 5, longest), 1 + i % STEPS) for i in range(_CROWD)]
        for repeated in super(Invariant, self).trials(make, shape, limits):
            needle = repeated.needle
            companies = [
                *repeated.companies,
                Company(BESIDE, Batch((needle, *long, short[0]), shape)),
                Company(SLOT, Batch((*short[:8], needle), shape)),
                Company(SLOT, Batch((*short[:11], needle, *short[11:]), shape)),
            ]
            if crowd:
                half = len(crowd) // 2
                companies.append(Company(BESIDE, Batch((*crowd[:half], needle, *crowd[half:]), shape)))
            yield Trial(needle, repeated.alone, tuple(companies))


@register_policy
@dataclass(frozen=True, slots=True)
class Native(_Plain):
    """Transformers' own behaviour in whatever batch it is given; promises nothing."""

    name = form = "native"
    accepted = "'native' (the control)"
    promises = False

    def plan(self, requests: Sequence[Request], limits: Limits) -> list[Batch]:
        """Return at most two batches: every request to generate, and every request to score."""
        generated = [request for request in requests if not request.continuation]
        scored = [request for request in requests if request.continuation]
        return [Batch(tuple(rows)) for rows in (generated, scored) if rows]


def _sortable(shape: Shape) -> tuple[int, ...]:
    return tuple(-1 if part is None else part for part in shape)
