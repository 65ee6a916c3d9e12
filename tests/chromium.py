"""A headless browser for the pages, and caches made up for them."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from support import MODEL, numerics, record, request, trace

from stablegen.core.record import Record

if TYPE_CHECKING:
    from playwright.sync_api import Browser

BROWSER = "STABLEGEN_TEST_BROWSER"
"""Environment variable: the program of a Chromium; none is ever downloaded."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
APPS = (None, "golden-eval", "nightly", "support bot")
SUBJECTS = ("music", "the sea", "a friend", "yesterday", "the garden", "this town", "winter", "an old house")
OPENINGS = ("Tell me about", "What do you think of", "I never understood", "The story of", "Write a line on")


def program() -> str | None:
    """Return the path of a Chromium on this machine; None where there is none."""
    named = os.environ.get(BROWSER)
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Browser]:
    """Start the machine's Chromium, and end it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program(), args=list(FLAGS))
        try:
            yield started
        finally:
            started.close()


def made_up(count: int, *, steps: int = 64, seed: int = 0) -> Iterator[Record]:
    """Yield records as of a cache long in use: several apps, two models, three numerics, margins of every size."""
    draw = random.Random(seed)
    hows = [numerics(), numerics(policy="native", dtype="bfloat16"), numerics(policy="padded:8", torch="2.11.0")]
    models = [MODEL, MODEL.model_copy(update={"digest": "6" * 64, "name": "another-model"})]
    for place in range(count):
        opening, subject = draw.choice(OPENINGS), draw.choice(SUBJECTS)
        # most answers are safe at every step, as they are of a trained model
        nearest = draw.choice((1e-4, 0.01, 0.1, 0.3, 0.3, 0.3))
        margins = [nearest + draw.expovariate(0.4) for _ in range(steps)]
        yield record(
            request(
                (place, place % 7),
                new=steps,
                prompt=f"{opening} {subject}, number {place}.",
                model=models[place % 5 == 0],
            ),
            traced=trace(margins, score=8.0 + place % 9),
            text=" ".join(draw.choices(SUBJECTS, k=steps // 4)),
            numerics=hows[place % 3],
            created=1_700_000_000.0 + 600.0 * place,
            app=APPS[place % len(APPS)],
        )
