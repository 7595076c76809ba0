"use strict";
// Texts come from models and from users: they reach the page as text nodes and attributes, never as markup.
const { answers } = JSON.parse(document.getElementById("trace").textContent, (key, value) =>
  key === "candidates" ? value.map(([id, text, log_p, log_q, rewards]) => ({ id, text, log_p, log_q, rewards })) : value);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const ROWS = ["guided", "unguided"];

function make(tag, attributes = {}, ...children) {
  const node = tag === "svg" || tag === "path" ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// ---- Numbers and texts as they are shown

const number = (x) => (x === null ? "−∞" : x.toFixed(2).replace(/^-(?=.*[1-9])/, "−").replace("-", ""));
const signed = (x) => (x > 0 ? "+" : "") + number(x);
const minus = (a, b) => (a === null || b === null ? null : a - b);
const probability = (log) => (log === null ? 0 : Math.exp(log));

function percent(log) {
  const x = 100 * probability(log);
  return x === 0 ? "0 %" : x < 0.1 ? "<0.1 %" : `${x.toFixed(x < 10 ? 1 : 0)} %`;
}

// Control characters, and those that would turn the direction of the text around them, are shown by name.
const SIGNS = { "\n": "⏎", "\t": "⇥", "\r": "␍" };
const INVISIBLE = /[\p{Cc}\u061c\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]/gu;
const named = (text) => text.replace(INVISIBLE, (c) => SIGNS[c] ?? `\\u${c.codePointAt(0).toString(16).padStart(4, "0")}`);

// The token that ends an answer, other special tokens, and those that are a part of a character have no text.
const withoutText = (token) => (pair.guided.eos_ids.includes(token.id) ? "⟨end⟩" : `⟨${token.id}⟩`);
const visible = (token) => (token.text === "" ? withoutText(token) : named(token.text).replaceAll(" ", "␣"));
const lines = (text) => text.split("\n").map(named).join("\n");
/** As `visible`, with the signs of spaces paler than letters. */
const visibleParts = (token) => visible(token).split(/(␣+)/).map((part) => (part[0] === "␣" ? make("span", { class: "sign" }, part) : part));
const quoted = (token) => (token.text === "" ? withoutText(token) : `“${named(token.text).trim() || visible(token)}”`);

// ---- What is computed of an answer

const best = (candidates, key) => candidates.reduce((a, b) => ((b[key] ?? -Infinity) > (a[key] ?? -Infinity) ? b : a));

/** The likeliest candidate before and after guidance, where these differ; null elsewhere. */
function change(token) {
  if (!token.candidates.length) return null;
  const [before, after] = [best(token.candidates, "log_p"), best(token.candidates, "log_q")];
  return (after.log_q ?? -Infinity) > (before.log_q ?? -Infinity) ? { before, after } : null;
}

/** The two tokens of a change in words; their spaces are shown where nothing else tells them apart. */
function changeInWords({ before, after }) {
  const name = quoted(before) === quoted(after) ? visible : quoted;
  return [make("s", {}, name(before)), ` → ${name(after)}`];
}

const influence = (token) => minus(token.log_q, token.log_p);
const rewardNames = (pair) => {
  const names = pair.guided.reward_models.map((path) => path.split(/[\\/]/).filter((part) => part && part !== "model").at(-1));
  const count = Math.max(...ROWS.map((name) => Math.max(pair[name]?.tokens[0]?.rewards.length ?? 0, finalRewards(pair[name]).length)));
  return Array.from({ length: count }, (_, j) => (count === 1 ? "reward" : `reward ${j + 1}${names[j] ? ` (${names[j]})` : ""}`));
};
const finalRewards = (row) => row?.guide_rewards ?? [];

/** What tokens can be coloured by; words and sentences get the sum or the mean of their tokens. */
function measuresOf(pair) {
  const rewards = rewardNames(pair)
    .map((name, j) => ({ name, of: (t) => t.rewards[j] ?? null, fold: "mean", scale: "range", says: "The reward of the answer up to and with the token." }))
    .filter(({ of }) => pair.guided.tokens.some((token) => of(token) !== null));
  return [
    { name: "log q − log p", of: influence, fold: "sum", scale: "signed",
      says: "p is the language model’s distribution, q the one that the token was drawn from. Blue tokens were made likelier, orange ones less likely." },
    ...rewards,
    { name: "entropy", of: (t) => t.entropy, fold: "mean", scale: "amount", says: "How undecided the language model was before guidance, in nats." },
    { name: "KL", of: (t) => t.kl, fold: "sum", scale: "amount", says: "KL(q‖p) at the token’s place, in nats: how far guidance moved the whole distribution." },
  ];
}

/** The number of each token's token, word or sentence. */
function unitsOf(tokens, unit) {
  if (unit === "token") return tokens.map((_, i) => i);
  const text = tokens.map((token) => token.text).join("");
  const segments = [...new Intl.Segmenter(undefined, { granularity: unit }).segment(text)];
  let at = 0, segment = 0;
  return tokens.map((token) => {
    const first = at + Math.max(token.text.search(/\S/), 0);
    at += token.text.length;
    if (token.text === "") return segments.length;
    while (segment + 1 < segments.length && segments[segment + 1].index <= first) segment += 1;
    return segment;
  });
}

function folded(tokens, measure, unit) {
  const units = unitsOf(tokens, unit), totals = new Map();
  tokens.forEach((token, i) => {
    const value = measure.of(token), known = totals.get(units[i]) ?? { total: 0, count: 0 };
    if (value !== null) totals.set(units[i], { total: known.total + value, count: known.count + 1 });
  });
  return units.map((i) => {
    const known = totals.get(i);
    return known === undefined ? null : measure.fold === "mean" ? known.total / known.count : known.total;
  });
}

/** The index of the first token that differs, or the shorter answer's length. */
function firstDivergence(one, other) {
  const end = Math.min(one.length, other.length);
  for (let i = 0; i < end; i++) if (one[i].id !== other[i].id) return i;
  return end;
}

// ---- State: which answer is shown, what it is coloured by, which token is in focus

let pair, parting, measures, spans, charts, changed;
let measureName = "log q − log p", unit = "token", focus = null;
const tokensOf = (name) => pair[name].tokens;
const shownRows = () => ROWS.filter((name) => pair[name]);
const titleOf = (name) => (name === "guided" && isUnguided(pair.guided) ? "Answer" : name[0].toUpperCase() + name.slice(1));
const isUnguided = (row) => !row.weights.some((weight) => weight !== 0);

function show(index) {
  pair = answers[index];
  parting = pair.unguided ? firstDivergence(tokensOf("guided"), tokensOf("unguided")) : 0;
  measures = measuresOf(pair);
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
const fact = ([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, named(String(value))));

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
  const choices = measures.map(({ name }) => {
    const input = make("input", { type: "radio", name: "measure", value: name });
    input.checked = name === measureName;
    return make("label", {}, input, name);
  });
  byId("measures").replaceChildren(byId("measures").querySelector("legend"), ...choices);
}

function showTexts() {
  spans = Object.fromEntries(shownRows().map((row) => [row, tokensOf(row).map((token, index) => tokenSpan(row, token, index))]));
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

/** Spaces before a token's first letter stand outside its box: lines break there. */
const leadingSpace = (token) => /^ +(?=\S)/.exec(token.text)?.[0] ?? "";

function tokenSpan(row, token, index) {
  const span = make("span", { class: "token", role: "option", tabindex: "-1", "aria-selected": "false", "data-row": row, "data-index": index });
  if (token.text === "") span.append(make("span", { class: "sign" }, withoutText(token)));
  for (const part of token.text.slice(leadingSpace(token).length).split(/(\n)/)) {
    if (part === "\n") span.append(make("span", { class: "sign" }, "⏎"), "\n");
    else if (part) span.append(named(part));
  }
  if (row === "guided" && changed[index]) span.classList.add("changed");
  return span;
}

function colour() {
  const measure = measures.find(({ name }) => name === measureName);
  const values = Object.fromEntries(shownRows().map((row) => [row, folded(tokensOf(row), measure, unit)]));
  const known = Object.values(values).flat().filter((x) => x !== null);
  // The strongest 2 % share the strongest colour, so that one token does not make all others pale.
  const sizes = known.map((x) => (measure.scale === "signed" ? Math.abs(x) : x)).sort((a, b) => a - b);
  const most = sizes.length ? sizes[measure.scale === "range" ? sizes.length - 1 : Math.floor(0.98 * (sizes.length - 1))] : 0;
  const least = measure.scale === "range" ? sizes[0] ?? 0 : 0;
  for (const row of shownRows()) {
    spans[row].forEach((span, i) => {
      const x = values[row][i];
      const size = x === null || most === least ? 0 : ((measure.scale === "signed" ? Math.abs(x) : x) - least) / (most - least);
      span.style.setProperty("--share", Math.min(Math.max(size, 0), 1).toFixed(3));
      span.classList.toggle("up", measure.scale === "signed" && x > 0);
      span.classList.toggle("down", measure.scale === "signed" && x < 0);
    });
  }
  const ends = { signed: [`${number(-most)} or less`, `+${number(most)} or more`], amount: ["0", `${number(most)} or more`], range: [number(least), number(most)] }[measure.scale];
  const isGreedy = measure.of === influence && shownRows().every((row) => tokensOf(row).every((token) => token.log_q === 0));
  const greedy = isGreedy ? " Here each token was certain, since the method does not sample: the number is −log p." : "";
  const of = unit === "token" ? "" : ` Each ${unit} has the ${measure.fold} over its tokens.`;
  const underlined = changed.some(Boolean) ? " Underlined: guidance changed which token is likeliest." : "";
  byId("legend").replaceChildren(
    make("span", {}, ends[0]), make("i", { class: measure.scale === "signed" ? "signed" : "amount" }), make("span", {}, ends[1]),
    make("p", {}, measure.says + greedy + of + underlined));
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
  const facts = [
    ["log p", `${number(token.log_p)} (${percent(token.log_p)})`], ["log q", `${number(token.log_q)} (${percent(token.log_q)})`],
    ["log q − log p", signed(influence(token))], ["entropy of p", number(token.entropy)], ["KL(q‖p)", number(token.kl)],
    ...token.rewards.map((reward, j) => [rewardNames(pair)[j], number(reward)]),
  ];
  panel.replaceChildren(close, make("h2", {}, where), make("p", { class: "name" }, ...visibleParts(token)), ...notes, make("dl", {}, ...facts.map(fact)), candidatesOf(token));
}

function candidatesOf(token) {
  const candidates = token.candidates;
  if (!candidates.length) return make("p", { class: "muted" }, "The trace has no candidates of this token.");
  const count = token.candidate_count ?? candidates.length;
  const rewards = candidates[0].rewards.map((_, j) => (candidates[0].rewards.length === 1 ? "reward" : `r${j + 1}`));
  const bar = (log, kind) => {
    const cell = make("td", { class: `bar ${kind}` }, percent(log));
    cell.style.setProperty("--share", probability(log).toFixed(4));
    return cell;
  };
  const rows = candidates.map((candidate) => {
    const isDrawn = candidate.id === token.id;
    const name = make("th", { scope: "row" }, ...visibleParts(candidate), isDrawn ? make("span", { class: "muted" }, " drawn") : "");
    const logs = [candidate.log_p, candidate.log_q].map((x) => make("td", { class: "log" }, number(x)));
    return make("tr", { class: isDrawn ? "drawn" : null }, name, bar(candidate.log_p, "base"), bar(candidate.log_q, "fused"), ...logs, ...candidate.rewards.map((x) => make("td", {}, number(x))));
  });
  const head = [["candidate"], ["p"], ["q"], ["log p", "log"], ["log q", "log"], ...rewards.map((name) => [name])];
  const caption = make("caption", { class: "hidden" }, "Candidates of this token");
  const table = make("table", {}, caption, make("thead", {}, make("tr", {}, ...head.map(([name, kind]) => make("th", { scope: "col", class: kind ?? null }, name)))), make("tbody", {}, ...rows));
  const cut = count > candidates.length ? [make("p", { class: "muted" }, `${candidates.length} of ${count} candidates: the likeliest under p or q.`)] : [];
  return make("div", { class: "scrolls" }, table, ...cut);
}

// ---- Moving

/** Makes a token the one in focus, or none. */
function choose(place) {
  if (focus) spans[focus.row][focus.index].setAttribute("aria-selected", "false");
  focus = place;
  if (place) {
    const token = tokensOf(place.row)[place.index], span = spans[place.row][place.index];
    for (const other of byId("texts").querySelectorAll(`[data-row=${place.row}][tabindex="0"]`)) other.setAttribute("tabindex", "-1");
    span.setAttribute("tabindex", "0");
    span.setAttribute("aria-selected", "true");
    // The name that a screen reader says: the panel's first lines.
    const change = span.classList.contains("changed") ? ", guidance changed the likeliest token" : "";
    span.setAttribute("aria-label", `${quoted(token)}, log q minus log p ${signed(influence(token))}${change}`);
  }
  inspect(place);
}

function moveTo(place) {
  const span = spans[place.row][place.index];
  if (document.activeElement === span) choose(place);
  else span.focus();
}

function placeOf(event) {
  const span = event.target.closest?.(".token");
  return span ? { row: span.dataset.row, index: Number(span.dataset.index) } : null;
}

/** The token on the line above (-1) or below (+1) that is nearest to this one's middle. */
function nextLine({ row, index }, way) {
  const boxOf = (i) => spans[row][i].getClientRects()[0] ?? spans[row][i].getBoundingClientRect();
  const from = boxOf(index), middle = from.left + from.width / 2;
  let line = null, found = index, nearest = Infinity;
  for (let i = index + way; i >= 0 && i < spans[row].length; i += way) {
    const box = boxOf(i);
    if (line === null && Math.abs(box.top - from.top) < from.height / 2) continue;
    if (line !== null && Math.abs(box.top - line) > box.height / 2) break;
    line ??= box.top;
    const distance = Math.abs(box.left + box.width / 2 - middle);
    if (distance < nearest) [nearest, found] = [distance, i];
  }
  return found;
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
  const first = place.row === "unguided" ? parting : 0, last = tokensOf(place.row).length - 1;
  const moves = {
    ArrowLeft: () => place.index - 1, ArrowRight: () => place.index + 1, Home: () => first, End: () => last,
    ArrowUp: () => nextLine(place, -1), ArrowDown: () => nextLine(place, 1),
  };
  if (event.key in moves) {
    moveTo({ row: place.row, index: Math.min(Math.max(moves[event.key](), first), last) });
  } else if (event.key === "n" || event.key === "p") jump(event.key === "n" ? 1 : -1);
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
