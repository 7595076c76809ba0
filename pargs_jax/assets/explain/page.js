const ROWS = ["guided", "unguided"];
const { answers } = JSON.parse(document.getElementById("trace").textContent, (key, value) =>
  key === "candidates" ? value.map(([id, text, log_p, log_q, rewards]) => ({ id, text, log_p, log_q, rewards })) : value);

// ---- State: which answer is shown, what it is coloured by, which token is in focus

const rewardNames = (pair) => {
  const names = pair.guided.reward_models.map((path) => path.split(/[\\/]/).filter((part) => part && part !== "model").at(-1));
  const count = Math.max(...ROWS.map((name) => Math.max(pair[name]?.tokens[0]?.rewards.length ?? 0, finalRewards(pair[name]).length)));
  return Array.from({ length: count }, (_, j) => (count === 1 ? "reward" : `reward ${j + 1}${names[j] ? ` (${names[j]})` : ""}`));
};
const finalRewards = (row) => row?.guide_rewards ?? [];

let pair, parting, measures, spans, charts, changed;
let measureName = "log q − log p", unit = "token", focus = null;
const tokensOf = (name) => pair[name].tokens;
const shownRows = () => ROWS.filter((name) => pair[name]);
const titleOf = (name) => (name === "guided" && isUnguided(pair.guided) ? "Answer" : name[0].toUpperCase() + name.slice(1));
const isUnguided = (row) => !row.weights.some((weight) => weight !== 0);

function show(index) {
  pair = answers[index];
  parting = pair.unguided ? firstDivergence(tokensOf("guided"), tokensOf("unguided")) : 0;
  endIds = pair.guided.eos_ids;
  measures = measuresOf(rewardNames(pair)).filter(({ of, scale }) => scale !== "range" || pair.guided.tokens.some((token) => of(token) !== null));
  if (!measures.some(({ name }) => name === measureName)) measureName = measures[0].name;
  focus = null;
  changed = tokensOf("guided").map(change);
  byId("answers").querySelectorAll("button").forEach((button, i) => {
    if (i === index) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  });
  byId("prompt").textContent = lines(pair.guided.prompt);
  showSettings();
  showSummary();
  showCurves();
  showMeasures();
  showTexts();
  showChanges();
  inspect(null);
}

function showSettings() {
  const row = pair.guided;
  const facts = {
    method: row.method, weight: row.weights.join(", "), k: row.k, temperature: row.temperature, seed: row.seed,
    "language model": row.lm, [row.reward_models.length > 1 ? "reward models" : "reward model"]: row.reward_models.join(", "), options: row.options,
  };
  const shown = Object.entries(facts).filter(([, value]) => value != null && value !== "");
  byId("settings").replaceChildren(...shown.map(fact));
}
function showSummary() {
  const names = rewardNames(pair);
  const head = ["", "tokens", "ended by", "log p", "KL", ...names];
  const rows = shownRows().map((name) => {
    const row = pair[name], rewards = finalRewards(row);
    const cells = [row.tokens.length, row.finish_reason, number(row.log_probability), number(row.kl), ...names.map((_, j) => (j in rewards ? number(rewards[j]) : "–"))];
    const line = make("svg", { viewBox: "0 0 16 7", "aria-hidden": "true" }, make("path", { class: name, d: "M0 4H16" }));
    return make("tr", {}, make("th", { scope: "row" }, line, name === "unguided" ? unguidedTitle() : titleOf(name)), ...cells.map((cell) => make("td", {}, String(cell))));
  });
  byId("summary").replaceChildren(make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)))), make("tbody", {}, ...rows));
}

function unguidedTitle() {
  const { method, seed } = pair.unguided;
  const notes = [method === pair.guided.method ? null : method, seed === pair.guided.seed ? null : `seed ${seed}`].filter(Boolean);
  return notes.length ? `Unguided (${notes.join(", ")})` : "Unguided";
}

// ---- Curves

function showCurves() {
  const curves = [
    { name: "log p of the answer so far", of: (row) => accumulate(row.tokens.map((t) => t.log_p)), first: 0 },
    { name: "KL so far", of: (row) => accumulate(row.tokens.map((t) => t.kl)), first: 0 },
    ...rewardNames(pair).map((name, j) => ({
      name: pair.adds_up[j] ? `${name}, summed so far` : `${name} of the answer so far`,
      of: (row) => (row.tokens[0]?.rewards.length ? (pair.adds_up[j] ? accumulate : (x) => [null, ...x])(row.tokens.map((t) => t.rewards[j])) : []),
      final: (row) => finalRewards(row)[j] ?? null,
    })),
  ];
  // Without guidance a trace has no rewards of tokens, only those of the whole answer.
  charts = curves.filter(({ of }) => shownRows().some((row) => of(pair[row]).length)).map(drawCurve);
  byId("curves").replaceChildren(...charts.map(({ figure }) => figure));
}

function accumulate(values) {
  let total = 0;
  return [0, ...values.map((x) => (total += x ?? 0))];
}

function drawCurve({ name, of, final }) {
  const lines = shownRows().map((row) => ({ row, values: of(pair[row]), final: final?.(pair[row]) ?? null }));
  const steps = Math.max(1, ...lines.map(({ row }) => tokensOf(row).length));
  const all = lines.flatMap(({ values, final }) => [...values, final]).filter((x) => x !== null);
  const low = Math.min(...all), high = Math.max(...all);
  const y = (x) => (high === low ? 50 : 96 - (92 * (x - low)) / (high - low));
  const svg = make("svg", { viewBox: `0 0 ${steps} 100`, preserveAspectRatio: "none", role: "img" });
  if (pair.unguided && parting < steps) svg.append(make("path", { class: "part", d: `M${parting} 0V100` }));
  const ends = lines.map(({ row, values, final }) => {
    const points = values.map((x, i) => (x === null ? null : `${i} ${y(x).toFixed(2)}`)).filter(Boolean);
    if (points.length) svg.prepend(make("path", { class: row, d: `M${points.join("L")}` }));
    // Without rewards of its tokens an answer still has one of the whole: a dot at its end.
    else if (final !== null) svg.prepend(make("path", { class: `${row} end`, d: `M${tokensOf(row).length} ${y(final)}h0` }));
    return `${titleOf(row)} ends at ${number(values.at(-1) ?? final)}`;
  });
  svg.setAttribute("aria-label", `${name}, over ${steps} tokens. ${ends.join(", ")}.`);
  const here = make("path", { class: "here" });
  svg.append(here);
  const values = make("div", { class: "values" });
  const plot = make("div", { class: "plot" }, svg);
  if (all.length) plot.append(make("span", { class: "high", "aria-hidden": "true" }, number(high)), make("span", { class: "low", "aria-hidden": "true" }, number(low)));
  const at = (event) => {
    const box = plot.getBoundingClientRect();
    const step = Math.round(((event.clientX - box.left) / box.width) * steps);
    return { row: "guided", index: Math.min(Math.max(step - 1, 0), tokensOf("guided").length - 1) };
  };
  plot.addEventListener("pointermove", (event) => inspect(at(event)));
  plot.addEventListener("pointerleave", () => inspect(focus));
  plot.addEventListener("click", (event) => moveTo(at(event)));
  return { figure: make("figure", {}, make("figcaption", {}, name, values), plot), here, values, lines };
}

function markCurves(place) {
  for (const { here, values, lines } of charts) {
    here.setAttribute("d", place === null ? "" : `M${place.index + 1} 0V100`);
    const shown = lines.map(({ row, values, final }) => [row, (place === null ? values.at(-1) ?? final : values[place.index + 1]) ?? null]);
    const known = shown.filter(([, value]) => value !== null);
    values.textContent = known.map(([row, value]) => (lines.length > 1 ? `${row} ` : "") + number(value)).join(" · ");
  }
}

// ---- The texts and their colours

function showMeasures() {
  byId("measures").replaceChildren(byId("measures").querySelector("legend"), ...measureChoices(measures, measureName));
}

function showTexts() {
  spans = Object.fromEntries(shownRows().map((row) => [row, tokensOf(row).map((token, index) => tokenSpan(row, token, index, row === "guided" && changed[index]))]));
  const spaced = (row, from, to) => spans[row].slice(from, to).flatMap((span, i) => [i ? leadingSpace(tokensOf(row)[from + i]) : "", span]);
  const box = (label, part) => make("div", { class: "text", role: "listbox", "aria-orientation": "horizontal", dir: "auto", "aria-label": label }, ...part);
  if (!pair.unguided) {
    byId("texts").replaceChildren(box(`${titleOf("guided")}, ${spans.guided.length} tokens`, spaced("guided", 0)));
  } else {
    const isSame = parting === spans.guided.length && parting === spans.unguided.length;
    const together = parting ? [box(`Both answers, their first ${parting} tokens`, spaced("guided", 0, parting))] : [];
    const note = isSame ? "Both answers are the same." : parting ? `They part at token ${parting + 1}.` : "They differ from the first token on.";
    const columns = shownRows().map((row) => {
      const rest = spaced(row, parting);
      return make("div", {}, make("h3", {}, titleOf(row)), rest.length ? box(`${titleOf(row)}, from token ${parting + 1}`, rest) : make("p", { class: "muted" }, "ends here."));
    });
    byId("texts").replaceChildren(...together, make("p", { class: "part" }, note), ...(isSame ? [] : [make("div", { class: "columns two" }, ...columns)]));
  }
  // One stop of the tab key for each answer; arrow keys move inside.
  spans.guided[0]?.setAttribute("tabindex", "0");
  spans.unguided?.[parting]?.setAttribute("tabindex", "0");
  colour();
}

function colour() {
  const measure = measures.find(({ name }) => name === measureName);
  const shown = shownRows().map((row) => ({ tokens: tokensOf(row), spans: spans[row] }));
  const ends = colourTokens(shown, measure, unit);
  const isGreedy = measure.of === influence && shown.every(({ tokens }) => tokens.every((token) => token.log_q === 0));
  const notes = [
    isGreedy && "Here each token was certain, since the method does not sample: the number is −log p.",
    changed.some(Boolean) && "Underlined: guidance changed which token is likeliest.",
  ].filter(Boolean);
  byId("legend").replaceChildren(...legendOf(measure, unit, ends, notes));
}

// ---- The list of changes

function showChanges() {
  const tokens = tokensOf("guided"), places = [...tokens.keys()];
  const hasCandidates = tokens.some((token) => token.candidates.length);
  const isGuided = !isUnguided(pair.guided);
  const atChanges = places.filter((i) => changed[i]);
  const strongest = places.filter((i) => influence(tokens[i]) !== null).sort((a, b) => tokens[b].kl - tokens[a].kl).slice(0, 10);
  const byStrength = atChanges.toSorted((a, b) => tokens[b].kl - tokens[a].kl);
  const title = hasCandidates && isGuided ? "Where guidance changed the likeliest token" : "Where q is farthest from p";
  const said = !isGuided ? "The tokens of this answer were not guided."
    : hasCandidates ? `${atChanges.length} of ${tokens.length} places`
    : "The trace has no candidates, so it does not say which token was likeliest. These are the places of largest KL.";
  const list = make("ol", { id: "places", "aria-labelledby": "changes-title" });
  const fill = (chosen) => list.replaceChildren(...chosen.map((i) => make("li", {}, placeButton(i))));
  const header = make("header", {}, make("span", { class: "muted" }, said));
  if (hasCandidates && isGuided && atChanges.length) {
    const order = make("select", { "aria-label": "Order of the list" }, make("option", {}, "in order"), make("option", {}, "largest KL first"));
    order.addEventListener("change", () => fill(order.selectedIndex ? byStrength : atChanges));
    const step = (name, sign, way) => {
      const button = make("button", { type: "button", "aria-label": `${name} change` }, sign);
      button.addEventListener("click", () => jump(way));
      return button;
    };
    header.append(order, step("Previous", "‹", -1), step("Next", "›", 1));
    fill(atChanges);
  } else if (!hasCandidates || !isGuided) fill(strongest);
  byId("changes").replaceChildren(make("h2", { id: "changes-title" }, title), header, list);
}

function placeButton(index) {
  const token = tokensOf("guided")[index], found = changed[index];
  const words = found ? changeInWords(found) : [quoted(token)];
  const drawn = found && token.id !== found.after.id ? `, drew ${quoted(token)}` : "";
  const button = make("button", { type: "button" }, make("span", {}, ...words), make("span", { class: "muted" }, `token ${index + 1}, KL ${number(token.kl)}${drawn}`));
  button.addEventListener("click", () => moveTo({ row: "guided", index }));
  return button;
}

function jump(way) {
  const from = focus?.row === "guided" ? focus.index : focus ? Math.min(focus.index, parting) : way > 0 ? -1 : changed.length;
  for (let i = from + way; i >= 0 && i < changed.length; i += way) if (changed[i]) return moveTo({ row: "guided", index: i });
}

// ---- One token: its numbers and candidates

function inspect(place) {
  markCurves(place);
  const panel = byId("inspector");
  panel.classList.toggle("empty", place === null);
  if (place === null) {
    const keys = make("p", { class: "muted keys" }, make("kbd", {}, "←"), " ", make("kbd", {}, "→"), " ", make("kbd", {}, "↑"), " ", make("kbd", {}, "↓"), " move, ", make("kbd", {}, "n"), " ", make("kbd", {}, "p"), " go to the next and the previous change.");
    panel.replaceChildren(make("h2", {}, "Token"), make("p", {}, "Point at a token, or choose one, to see its numbers and candidates."), keys);
    return;
  }
  const { row, index } = place, token = tokensOf(row)[index], found = row === "guided" ? changed[index] : null;
  const isShared = pair.unguided && index < parting;
  const where = `Token ${index + 1} of ${tokensOf(row).length}` + (shownRows().length > 1 ? `, ${isShared ? "both answers" : row}` : "") + `, id ${token.id}`;
  const close = make("button", { id: "close", type: "button", "aria-label": "Close" }, "×");
  close.addEventListener("click", () => choose(null));
  const notes = [];
  if (found) notes.push(make("p", { class: "note" }, "Guidance changed the likeliest token: ", ...changeInWords(found), "."));
  if (row === "guided" && pair.unguided && index <= parting && tokensOf("unguided")[index]) {
    const other = tokensOf("unguided")[index];
    notes.push(make("p", { class: "muted" }, `Without guidance: ${quoted(other)} was drawn here, log q ${number(other.log_q)}.`));
  }
  panel.replaceChildren(close, make("h2", {}, where), make("p", { class: "name" }, ...visibleParts(token)), ...notes, make("dl", {}, ...factsOf(token, rewardNames(pair))),
    token.candidates.length ? candidatesOf(token) : make("p", { class: "muted" }, "The trace has no candidates of this token."));
}

// ---- Moving

/** Makes a token the one in focus, or none. */
function choose(place) {
  if (focus) select(spans[focus.row][focus.index], tokensOf(focus.row)[focus.index], false);
  focus = place;
  if (place) select(spans[place.row][place.index], tokensOf(place.row)[place.index], true);
  inspect(place);
}

function moveTo(place) {
  const span = spans[place.row][place.index];
  if (document.activeElement === span) choose(place);
  else span.focus();
}

const texts = byId("texts");
texts.addEventListener("pointerover", (event) => {
  const place = placeOf(event);
  if (place && event.pointerType !== "touch") inspect(place);
});
texts.addEventListener("pointerleave", () => inspect(focus));
texts.addEventListener("focusin", (event) => {
  const place = placeOf(event);
  if (place) choose(place);
});
texts.addEventListener("keydown", (event) => {
  const place = placeOf(event);
  if (!place || event.ctrlKey || event.metaKey || event.altKey) return;
  const index = indexAfterKey(event, spans[place.row], place.index, place.row === "unguided" ? parting : 0);
  if (index !== null) moveTo({ row: place.row, index });
  else if (event.key === "n" || event.key === "p") jump(event.key === "n" ? 1 : -1);
  else if (event.key === "Escape") choose(null);
  else return;
  event.preventDefault();
});
byId("measures").addEventListener("change", (event) => {
  measureName = event.target.value;
  colour();
});
byId("unit").addEventListener("change", (event) => {
  unit = event.target.value;
  colour();
});

byId("page").classList.toggle("alone", answers.length === 1);
byId("answers").replaceChildren(...answers.map(({ guided, unguided }, index) => {
  const [reward, other] = [guided, unguided].map((row) => finalRewards(row)[0] ?? null);
  const numbers = reward === null ? `${guided.tokens.length} tokens` : `reward ${number(reward)}${other === null ? "" : `, unguided ${number(other)}`}`;
  const button = make("button", { type: "button" }, make("span", {}, named(guided.prompt)), make("span", { class: "muted" }, `${guided.id}${guided.sample ? ` · answer ${guided.sample + 1}` : ""} · ${numbers}`));
  button.addEventListener("click", () => show(index));
  return make("li", {}, button);
}));
show(0);
