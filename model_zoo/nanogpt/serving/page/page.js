"use strict";

const $ = (id) => document.getElementById(id);
let running = null; // the AbortController of the answer that is coming

const bearer = () => ($("token").value ? { Authorization: `Bearer ${$("token").value}` } : {});

function tell(problem) {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

async function refused(answer) {
  if (answer.status === 401) {
    $("token-field").hidden = false;
    $("token").focus();
    return "This server wants a token.";
  }
  const told = await answer.json().catch(() => null);
  return told?.error?.message ?? `The server answered ${answer.status}.`;
}

async function look() {
  const answer = await fetch("v1/models", { headers: bearer() });
  if (!answer.ok) throw new Error(await refused(answer));
  const model = (await answer.json()).data[0];
  $("name").textContent = document.title = model.id;
  const step = model.step === null ? "" : `step ${model.step.toLocaleString()} · `;
  $("facts").textContent =
    `${step}${model.parameters.toLocaleString()} parameters · context of ${model.context.toLocaleString()} tokens`;
  return model.id;
}

/** What went wrong, in words: of a request that nobody answers, the browser only says that it has failed. */
const words = (error) => (error instanceof TypeError ? `The server does not answer (${error.message}).` : error.message);

/** The events of a stream, each parsed, up to [DONE]. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection ended before the answer did: there may be more to it.");
    held += value;
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function generate() {
  stop();
  const mine = (running = new AbortController());
  const prompt = $("prompt").value;
  const given = document.createElement("span");
  given.className = "given";
  given.textContent = prompt;
  $("text").replaceChildren(given);
  $("text").setAttribute("aria-busy", "true");
  $("stop").disabled = false;
  $("speed").value = "";
  tell("");
  let tokens = 0, began = 0;
  try {
    const model = await look();
    const wanted = {
      model, prompt, stream: true, logprobs: 0, // which tells how many tokens each event is of
      max_tokens: $("tokens").valueAsNumber,
      temperature: $("temperature").valueAsNumber,
      top_p: $("top-p").valueAsNumber,
    };
    if ($("seed").value) wanted.seed = $("seed").valueAsNumber;
    const answer = await fetch("v1/completions", {
      method: "POST", signal: mine.signal, body: JSON.stringify(wanted),
      headers: { "Content-Type": "application/json", ...bearer() },
    });
    if (!answer.ok) throw new Error(await refused(answer));
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      began ||= performance.now();
      tokens += choice.logprobs.tokens.length;
      $("text").append(choice.text);
      const seconds = (performance.now() - began) / 1000;
      const speed = tokens > 1 && seconds > 0 ? ` · ${Math.round((tokens - 1) / seconds)} a second` : "";
      $("speed").value = `${tokens.toLocaleString()} tokens${speed}`;
    }
  } catch (error) {
    if (error.name !== "AbortError") tell(words(error));
  } finally {
    if (running === mine) {
      running = null;
      $("stop").disabled = true;
      $("text").setAttribute("aria-busy", "false");
    }
  }
}

function stop() {
  running?.abort();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("stop").addEventListener("click", stop);
$("token").addEventListener("change", () => look().then(() => tell(""), (error) => tell(words(error))));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
look().catch((error) => tell(words(error)));
