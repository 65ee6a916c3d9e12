"use strict";
// Moves between the tokens of an answer by keyboard, and shows the details of the selected or hovered one.
(() => {
  const list = document.getElementById("tokens");
  if (!list) return;
  const steps = JSON.parse(document.getElementById("steps").textContent);
  const tokens = Array.from(list.querySelectorAll(".token"));
  const fragile = tokens.flatMap((token, step) => ("fragile" in token.dataset ? [step] : []));
  const field = (name) => document.getElementById("d-" + name);
  let active = tokens.findIndex((token) => token.tabIndex === 0);

  function show(step) {
    const one = steps[step];
    field("place").textContent = "step " + step;
    for (const name of ["text", "runner_up", "margin", "score", "probability", "logprob", "best"]) {
      const place = field(name);
      if (place) place.textContent = one[name];
    }
    field("text").className = "token r" + one.level;
    field("fragile").hidden = !fragile.includes(step);
  }

  function choose(step, focus = true) {
    if (step < 0 || step >= tokens.length) return;
    tokens[active].tabIndex = -1;
    tokens[active].setAttribute("aria-selected", "false");
    active = step;
    tokens[active].tabIndex = 0;
    tokens[active].setAttribute("aria-selected", "true");
    if (focus) tokens[active].focus();
    show(step);
  }

  // The token nearest to this one on the line above or below.
  function across(direction) {
    const here = tokens[active].getBoundingClientRect();
    let best = -1, least = Infinity, line = null;
    for (let step = active + direction; step >= 0 && step < tokens.length; step += direction) {
      const there = tokens[step].getBoundingClientRect();
      if (Math.abs(there.top - here.top) < here.height / 2) continue;
      if (line === null) line = there.top;
      if (Math.abs(there.top - line) > here.height / 2) break;
      const distance = Math.abs(there.left + there.width / 2 - here.left - here.width / 2);
      if (distance < least) [best, least] = [step, distance];
    }
    choose(best);
  }

  const next = () => choose(fragile.find((step) => step > active) ?? fragile[0] ?? -1);
  const previous = () => choose(fragile.findLast((step) => step < active) ?? fragile.at(-1) ?? -1);
  const forward = getComputedStyle(list).direction === "rtl" ? -1 : 1;
  const keys = {
    ArrowRight: () => choose(active + forward),
    ArrowLeft: () => choose(active - forward),
    ArrowDown: () => across(1),
    ArrowUp: () => across(-1),
    Home: () => choose(0),
    End: () => choose(tokens.length - 1),
    n: next,
    p: previous,
  };

  list.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || !Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  });
  const stepOf = (event) => tokens.indexOf(event.target.closest(".token"));
  list.addEventListener("click", (event) => choose(stepOf(event)));
  list.addEventListener("focusin", (event) => choose(stepOf(event), false));
  list.addEventListener("mouseover", (event) => { if (stepOf(event) >= 0) show(stepOf(event)); });
  list.addEventListener("mouseleave", () => show(active));
  document.getElementById("next")?.addEventListener("click", next);
  document.getElementById("previous")?.addEventListener("click", previous);
})();
