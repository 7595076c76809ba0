"use strict";
// What pages share that show texts token by token. Texts come from models and from users: they reach a page as text nodes
// and attributes, never as markup.
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes = {}, ...children) {
  const node = tag === "svg" || tag === "path" ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const fact = ([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, named(String(value))));

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
let endIds = []; // the page sets them
const withoutText = (token) => (endIds.includes(token.id) ? "⟨end⟩" : `⟨${token.id}⟩`);
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

/** What tokens can be coloured by; words and sentences get the sum or the mean of their tokens. */
const measuresOf = (rewardNames) => [
  { name: "log q − log p", of: influence, fold: "sum", scale: "signed",
    says: "p is the language model’s distribution, q the one that the token was drawn from. Blue tokens were made likelier, orange ones less likely." },
  ...rewardNames.map((name, j) => ({ name, of: (t) => t.rewards[j] ?? null, fold: "mean", scale: "range", says: "The reward of the answer up to and with the token." })),
  { name: "entropy", of: (t) => t.entropy, fold: "mean", scale: "amount", says: "How undecided the language model was before guidance, in nats." },
  { name: "KL", of: (t) => t.kl, fold: "sum", scale: "amount", says: "KL(q‖p) at the token’s place, in nats: how far guidance moved the whole distribution." },
];

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

// ---- Tokens and their colours

/** Spaces before a token's first letter stand outside its box: lines break there. */
const leadingSpace = (token) => /^ +(?=\S)/.exec(token.text)?.[0] ?? "";

/** The box of a token. `row` and `index` say which one it is. */
function tokenSpan(row, token, index, isChanged) {
  const span = make("span", { class: "token", role: "option", tabindex: "-1", "aria-selected": "false", "data-row": row, "data-index": index });
  if (token.text === "") span.append(make("span", { class: "sign" }, withoutText(token)));
  for (const part of token.text.slice(leadingSpace(token).length).split(/(\n)/)) {
    if (part === "\n") span.append(make("span", { class: "sign" }, "⏎"), "\n");
    else if (part) span.append(named(part));
  }
  if (isChanged) span.classList.add("changed");
  return span;
}

/** Selects a token's box or not. What a screen reader says of it are the first lines of its panel. */
function select(span, token, isSelected) {
  span.setAttribute("aria-selected", String(isSelected));
  if (!isSelected) return;
  for (const other of document.querySelectorAll(`.token[data-row=${span.dataset.row}][tabindex="0"]`)) other.setAttribute("tabindex", "-1");
  span.setAttribute("tabindex", "0");
  const change = span.classList.contains("changed") ? ", guidance changed the likeliest token" : "";
  span.setAttribute("aria-label", `${quoted(token)}, log q minus log p ${signed(influence(token))}${change}`);
}

/** Colours answers, each with its `tokens` and their `spans`. Returns what the ends of the scale stand for. */
function colourTokens(answers, measure, unit) {
  const values = answers.map(({ tokens }) => folded(tokens, measure, unit));
  const known = values.flat().filter((x) => x !== null);
  // The strongest 2 % share the strongest colour, so that one token does not make all others pale.
  const sizes = known.map((x) => (measure.scale === "signed" ? Math.abs(x) : x)).sort((a, b) => a - b);
  const most = sizes.length ? sizes[measure.scale === "range" ? sizes.length - 1 : Math.floor(0.98 * (sizes.length - 1))] : 0;
  const least = measure.scale === "range" ? sizes[0] ?? 0 : 0;
  answers.forEach(({ spans }, row) => spans.forEach((span, i) => {
    const x = values[row][i];
    const size = x === null || most === least ? 0 : ((measure.scale === "signed" ? Math.abs(x) : x) - least) / (most - least);
    span.style.setProperty("--share", Math.min(Math.max(size, 0), 1).toFixed(3));
    span.classList.toggle("up", measure.scale === "signed" && x > 0);
    span.classList.toggle("down", measure.scale === "signed" && x < 0);
  }));
  return { signed: [`${number(-most)} or less`, `+${number(most)} or more`], amount: ["0", `${number(most)} or more`], range: [number(least), number(most)] }[measure.scale];
}

/** The parts of the legend. `notes` are added to what the measure says. */
const legendOf = (measure, unit, [low, high], notes) => [
  make("span", {}, low), make("i", { class: measure.scale === "signed" ? "signed" : "amount" }), make("span", {}, high),
  make("p", {}, [measure.says, ...notes, ...(unit === "token" ? [] : [`Each ${unit} has the ${measure.fold} over its tokens.`])].join(" ")),
];

/** A radio button for each measure. */
const measureChoices = (measures, chosen) => measures.map(({ name }) => {
  const input = make("input", { type: "radio", name: "measure", value: name });
  input.checked = name === chosen;
  return make("label", {}, input, name);
});

// ---- One token: its numbers and candidates

const factsOf = (token, rewardNames) => [
  ["log p", `${number(token.log_p)} (${percent(token.log_p)})`], ["log q", `${number(token.log_q)} (${percent(token.log_q)})`],
  ["log q − log p", signed(influence(token))], ["entropy of p", number(token.entropy)], ["KL(q‖p)", number(token.kl)],
  ...token.rewards.map((reward, j) => [rewardNames[j], number(reward)]),
].map(fact);

/** The table of candidates. With `pick`, their names are buttons that call it with the candidate. */
function candidatesOf(token, pick = null) {
  const candidates = token.candidates;
  const count = token.candidate_count ?? candidates.length;
  const rewards = candidates[0].rewards.map((_, j) => (candidates[0].rewards.length === 1 ? "reward" : `r${j + 1}`));
  const bar = (log, kind) => {
    const cell = make("td", { class: `bar ${kind}` }, percent(log));
    cell.style.setProperty("--share", probability(log).toFixed(4));
    return cell;
  };
  const rows = candidates.map((candidate) => {
    const isDrawn = candidate.id === token.id;
    const name = pick ? make("button", { type: "button", "data-id": candidate.id }, ...visibleParts(candidate)) : make("span", {}, ...visibleParts(candidate));
    if (pick) {
      name.setAttribute("aria-label", `Go on with ${quoted(candidate)}`);
      name.addEventListener("click", () => pick(candidate));
    }
    const header = make("th", { scope: "row" }, name, isDrawn ? make("span", { class: "muted" }, token.isPicked ? " chosen" : " drawn") : "");
    const logs = [candidate.log_p, candidate.log_q].map((x) => make("td", { class: "log" }, number(x)));
    return make("tr", { class: isDrawn ? "drawn" : null }, header, bar(candidate.log_p, "base"), bar(candidate.log_q, "fused"), ...logs, ...candidate.rewards.map((x) => make("td", {}, number(x))));
  });
  const head = [["candidate"], ["p"], ["q"], ["log p", "log"], ["log q", "log"], ...rewards.map((name) => [name])];
  const caption = make("caption", { class: "hidden" }, "Candidates of this token");
  const table = make("table", {}, caption, make("thead", {}, make("tr", {}, ...head.map(([name, kind]) => make("th", { scope: "col", class: kind ?? null }, name)))), make("tbody", {}, ...rows));
  const cut = count > candidates.length ? [make("p", { class: "muted" }, `${candidates.length} of ${count} candidates: the likeliest under p or q.`)] : [];
  return make("div", { class: "scrolls" }, table, ...cut);
}

// ---- Moving

/** The row and the index of the token that an event is about. */
function placeOf(event) {
  const span = event.target.closest?.(".token");
  return span ? { row: span.dataset.row, index: Number(span.dataset.index) } : null;
}

/** The token on the line above (-1) or below (+1) that is nearest to this one's middle. */
function nextLine(spans, index, way) {
  const boxOf = (i) => spans[i].getClientRects()[0] ?? spans[i].getBoundingClientRect();
  const from = boxOf(index), middle = from.left + from.width / 2;
  let line = null, found = index, nearest = Infinity;
  for (let i = index + way; i >= 0 && i < spans.length; i += way) {
    const box = boxOf(i);
    if (line === null && Math.abs(box.top - from.top) < from.height / 2) continue;
    if (line !== null && Math.abs(box.top - line) > box.height / 2) break;
    line ??= box.top;
    const distance = Math.abs(box.left + box.width / 2 - middle);
    if (distance < nearest) [nearest, found] = [distance, i];
  }
  return found;
}

/** The index that a key leads to, in an answer's boxes from `first` on; null for other keys. */
function indexAfterKey(event, spans, index, first = 0) {
  if (event.ctrlKey || event.metaKey || event.altKey) return null;
  const last = spans.length - 1;
  const moves = {
    ArrowLeft: () => index - 1, ArrowRight: () => index + 1, Home: () => first, End: () => last,
    ArrowUp: () => nextLine(spans, index, -1), ArrowDown: () => nextLine(spans, index, 1),
  };
  return event.key in moves ? Math.min(Math.max(moves[event.key](), first), last) : null;
}
