const served = JSON.parse(byId("data").textContent);
const here = location.origin + location.pathname; // without a name and password, which fetch refuses in addresses
const rewardNames = served.guides.map((name, j) => (served.guides.length === 1 ? "reward" : `reward ${j + 1} (${name})`));
const measures = measuresOf(rewardNames);
let measureName = measures[0].name, unit = "token", focus = null;
endIds = served.eos_ids;

// ---- The form

/** A number with a slider. The field beside the slider takes numbers beyond the slider's ends too. */
function slider(id, label, { from, to, step, least = null, most = null, hint = "" }) {
  const range = make("input", { type: "range", min: from, max: to, step, "aria-label": `${label}, slider` });
  const field = make("input", { type: "number", id, min: least, max: most, step: step === 1 ? 1 : "any", required: "" });
  range.addEventListener("input", () => (field.value = range.value));
  field.addEventListener("input", () => (range.value = field.value));
  return make("div", { class: "setting" }, make("label", { for: id, title: hint || null }, label), range, field);
}

function setNumber(id, value) {
  const field = byId(id), range = field.previousElementSibling;
  range.disabled = field.disabled = value === null;
  if (value !== null) field.value = range.value = value;
}

const method = () => served.methods.find(({ name }) => name === byId("method").value);
const isChat = () => byId("ask").elements.kind.value === "chat";
const hasPlain = () => method().guided && byId("beside").checked;
const weightIds = served.guides.map((_, j) => `weight-${j}`);
const preferenceIds = Array.from({ length: served.objectives }, (_, j) => `preference-${j}`);
const numberOf = (id) => (byId(id).disabled ? null : byId(id).valueAsNumber);

function makeForm() {
  byId("served").replaceChildren(`Language model ${served.name}` + (served.guides.length ? `, guided by ${served.guides.join(", ")}` : ""));
  const kinds = [["Guided", true], ["Without guidance", false]].map(([label, guided]) =>
    make("optgroup", { label }, ...served.methods.filter((each) => each.guided === guided).map(({ name }) => make("option", {}, name))));
  byId("method").replaceChildren(...kinds.filter((group) => group.childElementCount));
  byId("method").value = served.usual_method;
  const usual = Math.max(1, ...served.methods.map(({ weight }) => weight ?? 0).filter((weight) => weight < 10));
  byId("weights").replaceChildren(
    ...served.guides.map((name, j) => slider(weightIds[j], served.guides.length === 1 ? "weight" : `weight of ${name}`, { from: 0, to: 4 * usual, step: 0.1 })),
    ...preferenceIds.map((id, j) => slider(id, `preference ${j + 1}`, { from: 0, to: 1, step: 0.01 })));
  const mostK = Math.max(1, ...served.methods.map(({ most_k }) => most_k ?? 1));
  byId("numbers").replaceChildren(
    slider("k", "candidates (k)", { from: 1, to: mostK, step: 1, least: 1, hint: "How many tokens are considered at each step" }),
    slider("temperature", "temperature", { from: 0, to: 2, step: 0.05, least: 0 }),
    slider("top_p", "top p", { from: 0.05, to: 1, step: 0.05, least: 0, most: 1 }),
    slider("gate_entropy", "entropy gate", { from: 0, to: 5, step: 0.1, least: 0, hint: "Only steps whose entropy is at least this, in nats, are guided" }),
    slider("max_tokens", "most tokens", { from: 1, to: served.max_new_tokens, step: 1, least: 1 }));
  preferenceIds.forEach((id) => setNumber(id, +(1 / served.objectives).toFixed(3)));
  setNumber("max_tokens", Math.min(64, served.max_new_tokens));
  byId("beside-label").hidden = !served.guides.length;
  takeUsualNumbers();
}

/** The numbers that the method's paper uses, as far as the server allows them. */
function takeUsualNumbers() {
  const { weight, k, temperature, top_p, guided, source, score } = method();
  weightIds.forEach((id) => setNumber(id, weight));
  setNumber("k", k);
  setNumber("temperature", temperature);
  setNumber("top_p", top_p);
  setNumber("gate_entropy", guided ? 0 : null);
  byId("method-hint").textContent = `${source}: ${score}`;
}

/** The body of a request for an answer as the form asks for it. `begun` are the tokens that the answer begins with. */
function requestOf(row, begun = []) {
  const { name, guided, top_p } = method();
  const text = byId("prompt").value;
  const stops = byId("stops").value.split("\n").filter(Boolean);
  const one = (values) => (values.length === 1 ? values[0] : values);
  const given = {
    model: guided ? `${served.name}+${name}` : served.name,
    ...(isChat() ? { messages: [{ role: "user", content: text }] } : { prompt: text }),
    max_tokens: numberOf("max_tokens") - begun.length,
    temperature: numberOf("temperature"),
    top_p: top_p === 1 && numberOf("top_p") === 1 ? null : numberOf("top_p"),
    seed: byId("seed").valueAsNumber,
    stop: stops.length ? stops : null,
    method: guided ? null : name,
    weight: guided ? one(weightIds.map((id) => (row === "plain" ? 0 : numberOf(id)))) : null,
    preference: guided && preferenceIds.length ? preferenceIds.map(numberOf) : null,
    k: numberOf("k"),
    gate_entropy: numberOf("gate_entropy") || null,
    begin_with: begun.length ? begun.map(({ id }) => id) : null,
  };
  return Object.fromEntries(Object.entries(given).filter(([, value]) => value !== null));
}

const pathOf = (body) => ("messages" in body ? "v1/chat/completions" : "v1/completions");

// ---- The same request elsewhere

const KNOWN_TO_OPENAI = ["model", "messages", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop"];

function showCode() {
  const body = requestOf("guided");
  const quotedBody = `'${JSON.stringify(body, null, 1).replaceAll("'", "'\\''")}'`;
  byId("curl").textContent = `curl ${here}${pathOf(body)} -H 'Content-Type: application/json' \\\n  -H "Authorization: Bearer $PARGS_API_KEY" -d ${quotedBody}`;
  const isOwn = ([name]) => !KNOWN_TO_OPENAI.includes(name), fields = Object.entries(body);
  const named = fields.filter((each) => !isOwn(each)).map(([name, value]) => `    ${name}=${literal(value)},\n`).join("");
  const own = fields.filter(isOwn);
  const extra = own.length ? `    extra_body=${literal(Object.fromEntries(own))},\n` : "";
  const [call, text] = isChat() ? ["chat.completions", "message.content"] : ["completions", "text"];
  byId("python").textContent = `import os

from openai import OpenAI

client = OpenAI(base_url="${here}v1", api_key=os.environ.get("PARGS_API_KEY", "none"))
reply = client.${call}.create(
${named}${extra})
print(reply.choices[0].${text})
`;
}

/** A value in Python, which reads JSON's strings, numbers, lists and objects as they are. */
function literal(value) {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${literal(each)}`).join(", ")}}`;
}

async function copy(event) {
  const { target } = event, pre = byId(target.dataset.of);
  try {
    await navigator.clipboard.writeText(pre.textContent);
    target.textContent = "Copied";
  } catch { // browsers give the clipboard to secure addresses only
    getSelection().selectAllChildren(pre);
    target.textContent = "Selected";
  }
  setTimeout(() => (target.textContent = "Copy"), 2000);
}

// ---- Asking

/** The chunks of a reply. Throws an Error that says what went wrong in one line. */
async function* chunksOf(body, signal) {
  const sent = { ...body, stream: true, stream_options: { include_usage: true }, stream_trace: true };
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(sent), signal };
  let response;
  try {
    response = await fetch(here + pathOf(body), options);
  } catch (error) {
    throw signal.aborted ? error : new Error("the server cannot be reached");
  }
  if (!response.ok) throw new Error((await response.json().catch(() => null))?.error?.message ?? `the server answered ${response.status}`);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw signal.aborted ? error : new Error("the connection was lost");
    });
    if (done) throw new Error("the server ended the answer too early");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

/** Has an answer written, behind tokens that it begins with. */
async function write(answer, begun, body) {
  answer.aborter?.abort();
  const aborter = new AbortController();
  Object.assign(answer, { aborter, body, tokens: begun, end: null, usage: null, said: null, since: performance.now(), seconds: null });
  redraw(answer);
  try {
    for await (const { choices, usage } of chunksOf(body, aborter.signal)) {
      if (usage) answer.usage = usage;
      for (const { finish_reason, pargs } of choices) {
        if (finish_reason) Object.assign(answer, { end: finish_reason, said: pargs });
        if (pargs) append(answer, pargs.tokens);
      }
    }
  } catch (error) {
    if (answer.aborter !== aborter) return; // another answer took its place
    answer.end = aborter.signal.aborted ? "stopped" : "failed";
    if (answer.end === "failed") complain(error.message);
  }
  if (answer.aborter !== aborter) return;
  answer.aborter = null;
  answer.seconds = (performance.now() - answer.since) / 1000;
  showState(answer);
  colourSoon();
}

function complain(message) {
  byId("error").textContent = message && `${message[0].toUpperCase()}${message.slice(1)}${message.endsWith(".") ? "" : "."}`;
}

function generate() {
  complain("");
  choose(null);
  for (const answer of shownAnswers()) {
    answer.earlier = [];
    write(answer, [], requestOf(answer.row));
  }
}

function stop() {
  for (const { aborter } of Object.values(answers)) aborter?.abort();
  byId("generate").focus();
}

/** Lets an answer go on with another token in the place of one of its own, with the settings that the form has now. */
function goOn({ row, index }, candidate) {
  const answer = answers[row], { tokens, end, usage, said, seconds, body } = answer, replaced = tokens[index];
  complain("");
  answer.aborter?.abort();
  answer.earlier.push({ tokens, end: end ?? "stopped", usage, said, seconds, body });
  const { id, text, log_p, log_q, rewards } = candidate;
  const begun = [...tokens.slice(0, index), { ...replaced, id, text, log_p, log_q, rewards, isPicked: true }];
  const asked = requestOf(row, begun), { messages, prompt } = body;
  const isOver = endIds.includes(id) ? "stop" : asked.max_tokens < 1 ? "length" : null;
  if (isOver) {
    Object.assign(answer, { aborter: null, tokens: begun, end: isOver, said: null, seconds: null });
    redraw(answer);
  } else {
    delete asked.messages;
    delete asked.prompt;
    write(answer, begun, { ...asked, ...(messages ? { messages } : { prompt }) });
  }
  moveTo({ row, index });
}

function goBack(answer) {
  answer.aborter?.abort();
  Object.assign(answer, { aborter: null, ...answer.earlier.pop() });
  if (focus?.row === answer.row) choose(null);
  redraw(answer);
}

// ---- The answers

const answers = Object.fromEntries(["guided", "plain"].map((row) => [row, makeAnswer(row)]));
const shownAnswers = () => (hasPlain() ? [answers.guided, answers.plain] : [answers.guided]);
const titleOf = (row) => (row === "plain" ? "Plain" : method().guided ? "Guided" : "Answer");

function makeAnswer(row) {
  const answer = { row, tokens: [], spans: [], earlier: [], end: null, aborter: null };
  answer.title = make("h3", {});
  answer.settings = make("span", { class: "muted" });
  answer.back = make("button", { type: "button", class: "small" }, "Back");
  answer.back.addEventListener("click", () => goBack(answer));
  answer.box = make("div", { class: "text", role: "listbox", "aria-orientation": "horizontal", dir: "auto", "data-empty": "The answer appears here." });
  answer.state = make("p", { class: "state muted", role: "status" });
  answer.used = make("dl", {});
  answer.section = make("section", { class: "answer" }, make("header", {}, answer.title, answer.settings, answer.back), answer.box, answer.state, answer.used);
  return answer;
}

function showColumns() {
  byId("texts").classList.toggle("two", hasPlain());
  for (const answer of Object.values(answers)) {
    const isShown = shownAnswers().includes(answer);
    answer.section.hidden = !isShown;
    answer.title.textContent = titleOf(answer.row);
    showSettings(answer);
    answer.box.setAttribute("aria-label", `${titleOf(answer.row)} answer`);
    if (!isShown) answer.aborter?.abort();
  }
  colourSoon();
}

/** What an answer was asked with; the form may say something else by now. */
function showSettings({ body, settings }) {
  const { model, method, weight } = body ?? {};
  const weights = weight === undefined ? [] : [`weight ${[weight].flat().join(", ")}`];
  settings.textContent = body ? [method ?? model.slice(served.name.length + 1), ...weights, `seed ${body.seed}`].join(", ") : "";
}

function redraw(answer) {
  showSettings(answer);
  const { tokens } = answer;
  Object.assign(answer, { tokens: [], spans: [] });
  if (focus?.row === answer.row) focus = null;
  answer.box.replaceChildren();
  append(answer, tokens);
  inspect(focus);
}

function append(answer, tokens) {
  const isGuided = answer.row === "guided" && answer.body?.weight !== undefined;
  for (const token of tokens) {
    const index = answer.tokens.length, span = tokenSpan(answer.row, token, index, isGuided && change(token));
    if (index === 0) span.setAttribute("tabindex", "0");
    if (token.isPicked) span.classList.add("picked");
    answer.box.append(index ? leadingSpace(token) : "", span);
    answer.tokens.push(token);
    answer.spans.push(span);
  }
  showState(answer);
  colourSoon();
}

const ENDS = { stop: "Ended by itself.", length: "Reached the limit of tokens.", stopped: "Stopped.", failed: "Not finished." };
const sum = (values) => values.reduce((total, x) => total + (x ?? 0), 0);

/** What an answer used, and whether it is being written. */
function showState(answer) {
  const { tokens, usage, said, seconds, body } = answer, begun = body?.begin_with?.length ?? 0;
  const isWriting = answer.aborter !== null;
  answer.box.classList.toggle("writing", isWriting);
  answer.box.setAttribute("aria-busy", String(isWriting));
  answer.back.hidden = !answer.earlier.length;
  byId("stop").disabled = !Object.values(answers).some(({ aborter }) => aborter);
  const state = isWriting ? (tokens.length > begun ? "Writing …" : "Waiting …") : ENDS[answer.end] ?? "\u00a0";
  if (answer.state.textContent !== state) answer.state.textContent = state;
  const rewardOf = (j) => (tokens.length === 0 ? null : served.adds_up ? sum(tokens.map(({ rewards }) => rewards[j])) : tokens.at(-1).rewards[j] ?? null);
  const known = (x, words) => (x === null || x === undefined ? "–" : words(x));
  answer.used.replaceChildren(...[
    ["tokens", tokens.length + known(usage, ({ prompt_tokens }) => ` after a prompt of ${prompt_tokens - begun}`).replace("–", "")],
    ["KL", tokens.length ? number(sum(tokens.map(({ kl }) => kl))) : "–"],
    ["log p", tokens.length ? number(sum(tokens.map(({ log_p }) => log_p))) : "–"],
    ...rewardNames.map((name, j) => [name, known(rewardOf(j), number)]),
    ["tokens read", known(said, ({ lm_tokens, rm_tokens }) => `${lm_tokens}${served.guides.length ? `, by guides ${rm_tokens}` : ""}`)],
    ["seconds", known(seconds, (x) => x.toFixed(1))],
  ].map(fact));
}

let isColouring = false;
function colourSoon() {
  if (isColouring) return;
  isColouring = true;
  requestAnimationFrame(() => {
    isColouring = false;
    colour();
  });
}

function colour() {
  const shown = shownAnswers(), measure = measures.find(({ name }) => name === measureName);
  const notes = method().guided ? ["Underlined: guidance changed which token is likeliest."] : [];
  const scale = colourTokens(shown, measure, unit);
  const ends = shown.some(({ tokens }) => tokens.length) ? scale : ["–", "–"];
  byId("legend").replaceChildren(...legendOf(measure, unit, ends, notes));
  byId("parting").textContent = shown.length === 2 && shown.every(({ tokens }) => tokens.length) ? partingOf(...shown) : "\u00a0";
}

/** Where two answers part, in words; nothing as long as the one that is behind may still agree. */
function partingOf(one, other) {
  const parting = firstDivergence(one.tokens, other.tokens);
  const behind = [one, other].filter(({ tokens }) => tokens.length === parting);
  if (behind.some(({ end }) => end === null)) return "\u00a0";
  return behind.length === 2 ? "Both answers are the same." : `The answers part at token ${parting + 1}.`;
}

// ---- One token

function inspect(place) {
  const panel = byId("inspector");
  panel.classList.toggle("empty", place === null);
  if (place === null) {
    const keys = [["←", "→", "↑", "↓", " move, "], ["n", "p", " go to the next and the previous change, "], ["Enter", " goes to the candidates."]]
      .flatMap((group) => [...group.slice(0, -1).flatMap((key) => [make("kbd", {}, key), " "]), group.at(-1)]);
    panel.replaceChildren(make("h2", {}, "Token"), make("p", {}, "Point at a token of an answer to see its numbers. Click it, then one of its candidates, to go on from there."), make("p", { class: "muted keys" }, ...keys));
    return;
  }
  const { row, index } = place, answer = answers[row], token = answer.tokens[index];
  const found = answer.spans[index].classList.contains("changed") ? change(token) : null;
  const close = make("button", { id: "close", type: "button", "aria-label": "Close" }, "×");
  close.addEventListener("click", () => choose(null));
  const notes = [];
  if (token.isPicked) notes.push(make("p", { class: "note" }, "You chose this token. The entropy and the KL are those of its place."));
  if (found) notes.push(make("p", { class: "note" }, "Guidance changed the likeliest token: ", ...changeInWords(found), "."));
  panel.replaceChildren(
    close, make("h2", {}, `Token ${index + 1}, ${titleOf(row).toLowerCase()}, id ${token.id}`),
    make("p", { class: "name" }, ...visibleParts(token)), ...notes, make("dl", {}, ...factsOf(token, rewardNames)),
    make("h2", {}, "Go on with"),
    token.candidates.length ? candidatesOf(token, (candidate) => goOn(place, candidate)) : make("p", { class: "muted" }, "This token has no candidates."));
}

/** Makes a token the one in focus, or none. */
function choose(place) {
  if (focus) select(answers[focus.row].spans[focus.index], answers[focus.row].tokens[focus.index], false);
  focus = place;
  if (place) select(answers[place.row].spans[place.index], answers[place.row].tokens[place.index], true);
  inspect(place);
}

function moveTo({ row, index }) {
  const span = answers[row].spans[index];
  if (document.activeElement === span) choose({ row, index });
  else span.focus();
}

function jump({ row, index }, way) {
  const { spans } = answers[row];
  for (let i = index + way; i >= 0 && i < spans.length; i += way) if (spans[i].classList.contains("changed")) return moveTo({ row, index: i });
}

const texts = byId("texts"), form = byId("ask");
texts.addEventListener("pointerover", (event) => {
  const place = placeOf(event);
  if (place && event.pointerType !== "touch" && !focus) inspect(place);
});
texts.addEventListener("pointerleave", () => inspect(focus));
texts.addEventListener("click", (event) => {
  const place = placeOf(event);
  if (place) moveTo(place);
});
texts.addEventListener("focusin", (event) => {
  const place = placeOf(event);
  if (place) choose(place);
});
texts.addEventListener("keydown", (event) => {
  const place = placeOf(event);
  if (!place || event.ctrlKey || event.metaKey || event.altKey) return;
  const index = indexAfterKey(event, answers[place.row].spans, place.index);
  if (index !== null) moveTo({ row: place.row, index });
  else if (event.key === "n" || event.key === "p") jump(place, event.key === "n" ? 1 : -1);
  else if (event.key === "Enter") byId("inspector").querySelector("tbody button")?.focus();
  else if (event.key === "Escape") choose(null);
  else return;
  event.preventDefault();
});
byId("inspector").addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !focus) return;
  moveTo(focus);
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
form.addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
byId("method").addEventListener("change", takeUsualNumbers);
byId("new-seed").addEventListener("click", () => {
  byId("seed").value = Math.floor(Math.random() * 2 ** 31);
  showForm();
});
byId("stop").addEventListener("click", stop);
for (const button of byId("code").querySelectorAll("button")) button.addEventListener("click", copy);

function showForm() {
  byId("prompt-label").textContent = isChat() ? "Message" : "Prompt";
  byId("prompt").placeholder = isChat() ? "Write a message" : "Write a prompt";
  byId("prompt-hint").textContent = isChat() ? "A user’s turn, in the models’ prompt format." : "The models read it as it is.";
  showCode();
  showColumns();
}
form.addEventListener("input", showForm);
form.addEventListener("change", showForm);

makeForm();
byId("settings").open = matchMedia("(min-width: 52rem)").matches; // on narrow screens the answers come first
texts.replaceChildren(...Object.values(answers).map(({ section }) => section));
byId("measures").append(...measureChoices(measures, measureName));
for (const answer of Object.values(answers)) showState(answer);
showForm();
inspect(null);
byId("prompt").focus();
