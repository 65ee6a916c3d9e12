"""How long the page of a cache of 10,000 answers takes to make, to open, to filter, to sort and to scroll.

The cache is made up (``made_up`` in ``tests/chromium.py``). The page is opened anew for each repeat, in a context of
its own, from the file. Opening ends with the first rows on the screen, a filter, a sort and a scroll with the next
frame after it. Medians, least and most, in milliseconds.

Run it with: python tests/benchmarks/pages.py [--count 10000] [--repeats 15] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from chromium import browser, made_up
from support import client

import stablegen
from stablegen.pages.cache import write_cache
from stablegen.reports.cache import survey

AFTER = "await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));"
"""What waits until a frame has been drawn."""
ACTIONS = {
    "filter by a word": "const e = document.getElementById('search'); e.value = 'garden'; "
    "e.dispatchEvent(new Event('input', { bubbles: true }));",
    "filter by a letter more": "const e = document.getElementById('search'); e.value = 'garden 7'; "
    "e.dispatchEvent(new Event('input', { bubbles: true }));",
    "filter by app": "document.getElementById('filters').reset(); const e = document.getElementById('f-app'); "
    "e.selectedIndex = 1; e.dispatchEvent(new Event('input', { bubbles: true }));",
    "all again": "const e = document.getElementById('f-app'); e.selectedIndex = 0; "
    "e.dispatchEvent(new Event('input', { bubbles: true }));",
    "sort by probability": "document.querySelector('[data-column=p] button').click();",
    "sort by prompt": "document.querySelector('[data-column=prompt] button').click();",
    "scroll to the end": "const e = document.getElementById('viewport'); e.scrollTop = e.scrollHeight;",
}
SCROLL = """async () => {
  const view = document.getElementById("viewport"), frames = [];
  view.scrollTop = 0;
  let before = performance.now();
  for (let step = 0; step < 60; step++) {
    view.scrollTop += 900;
    await new Promise(requestAnimationFrame);
    frames.push(performance.now() - before);
    before = performance.now();
  }
  return frames;
}"""


def summary(times: list[float]) -> dict[str, float]:
    """Return median, least and most, in milliseconds."""
    return {name: round(pick(times), 1) for name, pick in (("median", statistics.median), ("min", min), ("max", max))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        page_file = Path(folder) / "report.html"
        with client(Path(folder) / "cache") as asking:
            asking.cache.put(made_up(options.count))
            started = time.perf_counter()
            report = survey(asking)
            surveyed = time.perf_counter()
            write_cache(report, page_file)
            written = time.perf_counter()
        size = page_file.stat().st_size
        with browser() as chromium:
            version = chromium.version
            for _ in range(options.repeats):
                context = chromium.new_context(viewport={"width": 1280, "height": 900})
                page = context.new_page()
                before = time.perf_counter()
                page.goto(page_file.as_uri(), wait_until="commit")
                page.locator("#rows tr[data-place]").first.wait_for()
                page.evaluate(f"async () => {{ {AFTER} }}")
                times.setdefault("open to the first rows", []).append((time.perf_counter() - before) * 1000)
                for name, action in ACTIONS.items():
                    code = (
                        f"async () => {{ const t = performance.now(); {action} {AFTER} return performance.now() - t; }}"
                    )
                    times.setdefault(name, []).append(page.evaluate(code))
                times.setdefault("a frame while scrolling", []).extend(page.evaluate(SCROLL))
                rows = page.locator("#rows tr[data-place]").count()
                context.close()
    result = {
        "stablegen": stablegen.__version__,
        "chromium": version,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "answers": options.count,
        "repeats": options.repeats,
        "page_megabytes": round(size / 1e6, 2),
        "survey_seconds": round(surveyed - started, 2),
        "write_seconds": round(written - surveyed, 2),
        "rows_in_the_document": rows,
        "milliseconds": {name: summary(values) for name, values in times.items()},
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
