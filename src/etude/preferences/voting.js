"use strict";
// Shows one pair at a time. A vote is sent, and the next pair shows once the server has it on its disk.
const $ = (id) => document.getElementById(id);
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "left", ArrowDown: "right", t: "tie", s: "skip" };
const SAID = { left: "left", right: "right", tie: "tie", skip: "skipped" };
const target = Number(document.body.dataset.target);
let rater = "", queue = [], busy = false, since = 0, votes = 0;
const loaded = new Map(); // by digest, a decoded image that stays in memory

function load(digest) {
  if (!loaded.has(digest)) {
    const image = new Image();
    image.src = "/image/" + digest;
    loaded.set(digest, image.decode().then(() => image, () => null));
    if (loaded.size > 40) loaded.delete(loaded.keys().next().value);
  }
  return loaded.get(digest);
}

async function ask(what, fields) {
  const answer = await fetch("/api/" + what, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ rater, ...fields }),
  });
  const message = await answer.json().catch(() => ({}));
  if (!answer.ok) throw Object.assign(new Error(message.error || "The server answers " + answer.status + "."), { status: answer.status });
  return message;
}

function notice(text, bad) {
  $("notice").textContent = text;
  $("notice").classList.toggle("bad", Boolean(bad));
}

async function take(message, said) {
  queue = message.queue;
  votes = message.votes;
  for (const pair of queue) { load(pair.left); load(pair.right); }
  const reached = target && votes >= target;
  const words = message.enough || (reached ? "You have reached the target, thank you. You may stop or go on." : "");
  $("count").textContent = target ? votes + " of " + target + " votes" : votes + (votes === 1 ? " vote" : " votes");
  if (target) {
    $("fill").style.width = Math.min(100, (100 * votes) / target) + "%";
    $("bar").setAttribute("aria-valuenow", String(Math.min(votes, target)));
  }
  $("booth").classList.toggle("ended", !queue.length);
  for (const side of ["left", "right"]) $(side).classList.remove("chosen");
  if (!queue.length) {
    $("prompt").textContent = "You have seen every pair. Thank you.";
    $("live").textContent = (said ? said + " " : "") + "You have seen every pair.";
    notice(words);
    return;
  }
  const pair = queue[0], images = await Promise.all([load(pair.left), load(pair.right)]);
  $("prompt").textContent = pair.prompt;
  ["left", "right"].forEach((side, i) => {
    const image = $(side + "-image");
    if (images[i]) image.src = images[i].src;
    const place = side === "left" ? "First image, left" : "Second image, right";
    image.alt = images[i] ? "" : place + ": it cannot be loaded";
    $(side).setAttribute("aria-label", place + ": choose it");
  });
  notice(images.every(Boolean) ? words : "An image cannot be loaded: skip this pair.", !images.every(Boolean));
  $("live").textContent = (said ? said + " " : "") + "Pair " + (votes + 1) + (target ? " of " + target : "") + ": " + pair.prompt;
  since = performance.now();
  document.body.dataset.pair = String(pair.pair);
}

async function act(what, fields, said) {
  if (busy) return;
  busy = true;
  $("booth").classList.add("busy");
  const started = performance.now();
  try {
    await take(await ask(what, fields), said);
    document.body.dataset.took = String(performance.now() - started);
  } catch (error) {
    for (const side of ["left", "right"]) $(side).classList.remove("chosen");
    if (error.status === 409) {
      try { await take(await ask("pairs", {}), "This pair was answered elsewhere."); } catch (again) { notice(again.message, true); }
    } else {
      notice(error.status ? error.message : "The server cannot be reached, and may not have saved this: try again.", true);
    }
  } finally {
    busy = false;
    $("booth").classList.remove("busy");
  }
}

function vote(answer) {
  if (busy || !queue.length) return;
  if (answer === "left" || answer === "right") $(answer).classList.add("chosen");
  const seconds = (performance.now() - since) / 1000;
  return act("vote", { pair: queue[0].pair, answer, seconds }, "Saved: " + SAID[answer] + ".");
}

function undo() {
  return act("undo", { votes }, "Undone.");
}

function enter(name) {
  rater = name;
  localStorage.setItem("etude-rater", name);
  $("door").hidden = true;
  $("booth").hidden = false;
  $("who").textContent = name;
  $("who").setAttribute("aria-label", "You vote as " + name + ": change the name");
  act("pairs", {});
}

function askName() {
  $("booth").hidden = true;
  $("door").hidden = false;
  $("name").value = rater;
  $("name").focus();
}

for (const button of document.querySelectorAll("[data-answer]")) button.addEventListener("click", () => vote(button.dataset.answer));
$("undo").addEventListener("click", undo);
$("who").addEventListener("click", askName);
$("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("name").value.trim().replace(/\s+/g, " ");
  if (name) enter(name);
});
document.addEventListener("keydown", (event) => {
  if ($("booth").hidden || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (!(key in KEYS) && key !== "u") return;
  event.preventDefault();
  if (key === "u") undo(); else vote(KEYS[key]);
});
const known = localStorage.getItem("etude-rater");
if (known) enter(known); else askName();
