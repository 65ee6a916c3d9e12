"use strict";
// The table of all answers: filtered and sorted; only the visible rows are in the document.
(() => {
  const data = JSON.parse(document.getElementById("answers-data").textContent);
  const by = (id) => document.getElementById(id);
  const [KEY, PROMPT, ANSWER, APPS, MODEL, STATUS, RISK, MARGIN, STEP, TOKEN, RUNNER, TOKENS, NUMERICS, BY, DATE, REASON,
    BASIS, FLAGS, BITS] = Array.from({ length: 19 }, (_, place) => place);
  const rows = data.rows;
  const AHEAD = 6;
  const grid = by("grid"), body = by("rows"), viewport = by("viewport"), details = by("details");

  // -- how values are shown

  const INVISIBLE = /[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
  const SIGNS = { "\n": "⏎", "\r": "␍", "\t": "⇥" };
  const escaped = (sign) => "\\u" + sign.charCodeAt(0).toString(16).padStart(4, "0");
  const oneLine = (text) => text.replace(INVISIBLE, (sign) => SIGNS[sign] ?? escaped(sign));
  const manyLines = (text) => text.replace(INVISIBLE, (sign) => (sign === "\n" || sign === "\t" ? sign : escaped(sign)));
  const whole = new Intl.NumberFormat("en-US");
  const raised = (power) => String(power).replace(/./g, (sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]);
  function number(value, digits = 3) {
    if (value === null) return "–";
    if (Number.isInteger(value)) return whole.format(value);
    const [mantissa, power] = value.toExponential(digits - 1).split("e").map(Number);
    if (power >= -4 && power < digits) return String(Number(value.toPrecision(digits)));
    return mantissa + "×10" + raised(power);
  }
  const short = (value) => number(value, value !== null && value < 0.1 ? 2 : 3); // the column is narrow
  const date = (seconds) => new Date(seconds * 1000).toISOString().slice(0, 10);
  const moment = (seconds) => new Date(seconds * 1000).toISOString().slice(0, 16).replace("T", " ");
  const apps = (row) => row[APPS].map((app) => data.apps[app]).join(", ");

  function element(tag, text, kind) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }
  const label = (status) => data.statuses[status].replace("_", " ");
  function chip(made, status) {
    made.className = "verdict v-" + data.statuses[status];
    made.textContent = label(status);
    return made;
  }
  const cell = (text, kind) => element("td", text, kind);
  function text(words) {
    const made = cell(undefined, "clip");
    const inside = element("bdi", oneLine(words.slice(0, 200)));
    inside.dir = "auto";
    made.append(inside);
    return made;
  }
  const cells = [
    (row) => { const made = cell(); made.append(chip(element("span"), row[STATUS])); return made; },
    (row) => text(row[PROMPT]),
    (row) => text(row[ANSWER]),
    (row) => cell(short(row[RISK]), "num"),
    (row) => cell(short(row[MARGIN]), "num"),
    (row) => text(apps(row)),
    (row) => text(data.models[row[MODEL]]),
    (row) => cell(data.words[row[BY]], "clip"),
    (row) => cell(whole.format(row[TOKENS]), "num"),
    (row) => cell(date(row[DATE])),
  ];

  // -- filtering and sorting

  const collator = new Intl.Collator("en", { numeric: true });
  const byNumber = (value) => (one, other) => value(rows[one]) - value(rows[other]);
  const byText = (value) => {
    const keys = new Map();
    const key = (place) => keys.get(place) ?? keys.set(place, value(rows[place]).slice(0, 80)).get(place);
    return (one, other) => collator.compare(key(one), key(other));
  };
  // column: how two rows compare, and whether the first click sorts in descending order
  const columns = {
    verdict: [(one, other) => one - other, false],
    p: [byNumber((row) => row[RISK] ?? -1), true],
    margin: [byNumber((row) => row[MARGIN] ?? Number.MAX_VALUE), false],
    prompt: [byText((row) => row[PROMPT]), false],
    answer: [byText((row) => row[ANSWER]), false],
    app: [byText(apps), false],
    model: [byText((row) => data.models[row[MODEL]]), false],
    by: [byText((row) => data.words[row[BY]]), false],
    tokens: [byNumber((row) => row[TOKENS]), true],
    date: [byNumber((row) => row[DATE]), true],
  };
  const haystacks = new Array(rows.length);
  const haystack = (place) =>
    (haystacks[place] ??= (rows[place][PROMPT] + "\n" + rows[place][ANSWER] + "\n" + rows[place][KEY]).toLowerCase());

  let order = rows.map((_, place) => place); // all rows, sorted
  let shown = order; // those that match the filters
  let sorted = { column: "verdict", down: false };
  let active = 0; // the selected row's place among those shown

  function filter() {
    const words = by("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const [status, app, model] = ["f-status", "f-app", "f-model"].map((id) => by(id).value);
    const kept = shown[active];
    shown = order.filter((place) => {
      const row = rows[place];
      if (status !== "" && row[STATUS] !== Number(status)) return false;
      if (model !== "" && row[MODEL] !== Number(model)) return false;
      if (app !== "" && !(app === "-1" ? row[APPS].length === 0 : row[APPS].includes(Number(app)))) return false;
      return words.every((word) => haystack(place).includes(word));
    });
    active = Math.max(0, shown.indexOf(kept));
    by("count").textContent = `${whole.format(shown.length)} of ${whole.format(rows.length)} answers`;
    by("nothing").hidden = shown.length > 0;
    grid.setAttribute("aria-rowcount", shown.length + 1);
    draw(true);
  }

  function sort(column) {
    const [compare, downFirst] = columns[column];
    const down = sorted.column === column ? !sorted.down : downFirst;
    sorted = { column, down };
    const sign = down ? -1 : 1;
    order = rows.map((_, place) => place).sort((one, other) => sign * compare(one, other) || one - other);
    mark();
    viewport.scrollTop = 0;
    filter();
    active = 0;
    draw(true);
  }

  function mark() {
    for (const head of grid.querySelectorAll("th[data-column]")) {
      if (head.dataset.column === sorted.column) head.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
  }

  // -- the visible rows

  const spaces = [element("tr"), element("tr")].map((made) => {
    made.className = "space";
    made.setAttribute("aria-hidden", "true");
    const inside = cell();
    inside.colSpan = cells.length;
    made.append(inside);
    return made;
  });
  let drawn = new Map(); // place among those shown -> its row in the document
  let height = 40;

  function make(place) {
    const made = element("tr");
    made.id = "row-" + place;
    made.dataset.place = place;
    made.setAttribute("aria-rowindex", place + 2);
    made.append(...cells.map((fill) => fill(rows[shown[place]])));
    return made;
  }

  function draw(redraw = false) {
    const top = Math.max(0, viewport.scrollTop);
    const first = Math.max(0, Math.floor(top / height) - AHEAD);
    const last = Math.min(shown.length, Math.ceil((top + viewport.clientHeight) / height) + AHEAD);
    if (redraw) drawn = new Map();
    const wanted = new Map();
    for (let place = first; place < last; place++) wanted.set(place, drawn.get(place) ?? make(place));
    const same = !redraw && wanted.size === drawn.size && [...wanted.keys()].every((place) => drawn.has(place));
    drawn = wanted;
    if (!same) {
      spaces[0].firstChild.style.height = first * height + "px";
      spaces[1].firstChild.style.height = Math.max(0, shown.length - last) * height + "px";
      body.replaceChildren(spaces[0], ...drawn.values(), spaces[1]);
    }
    for (const [place, row] of drawn) {
      row.setAttribute("aria-selected", place === active ? "true" : "false");
    }
    if (drawn.has(active)) grid.setAttribute("aria-activedescendant", "row-" + active);
    else grid.removeAttribute("aria-activedescendant");
  }

  function choose(place) {
    if (!shown.length) return;
    active = Math.min(shown.length - 1, Math.max(0, place));
    const head = grid.tHead.offsetHeight, room = viewport.clientHeight - head;
    const above = active * height;
    if (above < viewport.scrollTop) viewport.scrollTop = above;
    else if (above + height > viewport.scrollTop + room) viewport.scrollTop = above + height - room;
    draw();
  }

  // -- the details of one answer

  function fact(name, value) {
    by("d-facts").append(element("dt", name), element("dd", value));
  }

  function fill() {
    const row = rows[shown[active]];
    by("d-heading").textContent = `Answer ${active + 1} of ${whole.format(shown.length)}`;
    chip(by("d-verdict"), row[STATUS]);
    by("d-prompt").textContent = manyLines(row[PROMPT]);
    by("d-answer").textContent = manyLines(row[ANSWER]) || "(empty)";
    const stepKnown = row[STEP] !== null;
    by("d-step-heading").textContent = data.statuses[row[STATUS]] === "diverged" ? "First step that differs" : "Most fragile step";
    by("d-step-heading").hidden = by("d-duel").hidden = !stepKnown;
    by("d-token").textContent = row[TOKEN] === null ? "(its end)" : oneLine(row[TOKEN]);
    by("d-runner").textContent = row[RUNNER] === null ? "(its end)" : oneLine(row[RUNNER]);
    by("d-facts").replaceChildren();
    if (stepKnown) fact("step", `${row[STEP]} of ${row[TOKENS]}`);
    if (stepKnown) fact("margin", number(row[MARGIN], 4));
    fact("p(divergence)", number(row[RISK]) + (data.words[row[BASIS]] === "none" ? "" : ` (${data.words[row[BASIS]]})`));
    fact("because", data.words[row[REASON]].replaceAll("->", "→"));
    fact("computed by", data.numerics[row[NUMERICS]]);
    fact("computed", moment(row[DATE]) + " UTC");
    fact("app", oneLine(apps(row)) || "none");
    fact("model", oneLine(data.models[row[MODEL]]) + (row[BITS] & 1 ? "" : ", not the model or tokenizer of this report"));
    if (row[BITS] & 2) fact("kind", "a scored continuation");
    if (row[BITS] & 4) fact("superseded", "an earlier answer, which is kept with it");
    fact("key", row[KEY]);
    by("d-facts").lastChild.className = "mono";
    by("d-flagged").hidden = row[FLAGS].length === 0;
    by("d-devices").textContent = "Judged on " + data.devices;
    by("d-hits").replaceChildren(...row[FLAGS].map(([app, status, risk, current, seen]) => {
      const made = element("tr");
      const verdict = cell();
      verdict.append(chip(element("span"), status));
      const where = app < 0 ? "none" : oneLine(data.apps[app]);
      made.append(cell(moment(seen)), cell(where), verdict, cell(number(risk), "num"), cell(data.short[current]));
      return made;
    }));
    by("d-command").textContent = "stablegen inspect " + row[KEY];
    by("d-previous").disabled = active === 0;
    by("d-next").disabled = active === shown.length - 1;
    by("d-inside").scrollTop = 0;
  }

  function open() {
    if (!shown.length) return;
    fill();
    if (!details.open) details.showModal();
    by("d-inside").focus({ preventScroll: true });
  }

  function move(by_) {
    const before = active;
    choose(active + by_);
    if (active !== before) fill();
  }

  // -- keyboard and mouse

  const page = () => Math.max(1, Math.floor(viewport.clientHeight / height) - 2);
  const keys = {
    ArrowDown: () => choose(active + 1),
    ArrowUp: () => choose(active - 1),
    PageDown: () => choose(active + page()),
    PageUp: () => choose(active - page()),
    Home: () => choose(0),
    End: () => choose(shown.length - 1),
    Enter: open,
    " ": open,
  };
  grid.addEventListener("keydown", (event) => {
    if (event.target !== grid || event.ctrlKey || event.altKey || event.metaKey || !Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  });
  grid.tHead.addEventListener("click", (event) => {
    if (event.target.closest("button")) sort(event.target.closest("th").dataset.column);
  });
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-place]");
    if (!row || String(getSelection())) return;
    choose(Number(row.dataset.place));
    open();
  });
  details.addEventListener("keydown", (event) => {
    if (event.target.closest("button") && (event.key === "Enter" || event.key === " ")) return;
    if (event.key === "j" || (event.key === "ArrowDown" && event.altKey)) move(1);
    if (event.key === "k" || (event.key === "ArrowUp" && event.altKey)) move(-1);
  });
  details.addEventListener("click", (event) => { if (event.target === details) details.close(); });
  details.addEventListener("close", () => grid.focus({ preventScroll: true }));
  by("d-close").addEventListener("click", () => details.close());
  by("d-next").addEventListener("click", () => move(1));
  by("d-previous").addEventListener("click", () => move(-1));

  function refilter() {
    viewport.scrollTop = 0;
    filter();
    active = 0;
    draw();
  }
  by("filters").addEventListener("input", refilter);
  by("filters").addEventListener("submit", (event) => event.preventDefault());
  by("filters").addEventListener("reset", () => setTimeout(refilter));
  let waiting = false;
  viewport.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  });
  addEventListener("resize", () => draw());

  function choices(id, names, counts) {
    for (const [value, name] of names) {
      const made = element("option", `${oneLine(name)} (${whole.format(counts.get(value) ?? 0)})`);
      made.value = value;
      if (counts.get(value)) by(id).append(made);
    }
  }
  const counted = (values) => rows.reduce((found, row) => {
    for (const value of values(row)) found.set(value, (found.get(value) ?? 0) + 1);
    return found;
  }, new Map());
  choices("f-status", data.statuses.map((_, status) => [status, label(status)]), counted((row) => [row[STATUS]]));
  choices("f-app", [...data.apps.entries(), [-1, "no app"]], counted((row) => (row[APPS].length ? row[APPS] : [-1])));
  choices("f-model", [...data.models.entries()], counted((row) => [row[MODEL]]));
  mark();
  filter();
  const first = body.querySelector("tr[data-place]");
  if (first && first.offsetHeight && first.offsetHeight !== height) {
    height = first.offsetHeight;
    draw(true);
  }
})();
