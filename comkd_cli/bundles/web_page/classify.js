// The page: brings the model of the bundle around it into the browser, and names what pictures show.
"use strict";

const FORMAT = "comkd-bundle/1";
const SCORE = "max_probability";
const TOP = 5;
const RUNTIME = ["ort/ort.wasm.bundle.min.mjs", "ort/ort-wasm-simd-threaded.wasm"];
const KINDS = "PNG, JPEG, WebP, GIF and BMP files";
const OPENED_AS_A_FILE =
  "A browser does not let a page that is opened as a file read the files beside it.\n" +
  "In a terminal, in this folder, run\n    python -m http.server\nand open http://localhost:8000/";

/** A problem that a person can fix; its message is shown as it is. */
class Problem extends Error {}

const element = (id) => document.getElementById(id);

// --- the model ------------------------------------------------------------------------------------------

/** A file of the bundle. tick: called with the bytes that came so far. */
async function fetched(name, tick = () => {}) {
  let response;
  try {
    // Not from the cache: a graph that the browser kept from an earlier export does not fit a new manifest.
    response = await fetch(`./${name.split("/").map(encodeURIComponent).join("/")}`, { cache: "no-cache" });
  } catch {
    throw new Problem(`${name}: could not be fetched; is the server still running?`);
  }
  if (response.status === 404) throw new Problem(`${name}: is missing from the folder of this page`);
  if (!response.ok) throw new Problem(`${name}: the server returned ${response.status} ${response.statusText}`);
  const parts = [];
  let count = 0;
  try {
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      parts.push(value);
      count += value.length;
      tick(count);
    }
  } catch {
    throw new Problem(`${name}: the connection was lost; reload the page`);
  }
  return new Blob(parts, { type: response.headers.get("Content-Type") ?? "" });
}

/** The manifest, checked for what this page relies on. */
async function readManifest() {
  const content = await (await fetched("manifest.json")).text();
  let manifest;
  try {
    manifest = JSON.parse(content);
  } catch (error) {
    throw new Problem(`manifest.json: could not be read: ${error.message}`);
  }
  if (manifest?.format !== FORMAT) throw new Problem(`manifest.json: is not a manifest of format ${FORMAT}`);
  for (const field of ["preprocessing", "files", "precisions"]) {
    if (!manifest[field]) throw new Problem(`manifest.json: ${field}: missing`);
  }
  if (Object.keys(manifest.precisions).length === 0) {
    throw new Problem("manifest.json: precisions: should name the graphs of at least one precision");
  }
  manifest.preprocessing = { interpolation: "bicubic", resize_mode: "shortest", ...manifest.preprocessing };
  const { interpolation } = manifest.preprocessing;
  if (!Object.hasOwn(KERNELS, interpolation)) {
    throw new Problem(`manifest.json: preprocessing: interpolation should be bicubic or bilinear, not '${interpolation}'`);
  }
  manifest.confidence = confidenceOf(manifest);
  return manifest;
}

/** The temperature and the threshold of a manifest; those of older bundles are 1 and none. ?threshold=off leaves it out. */
function confidenceOf({ calibration, threshold }) {
  const temperature = calibration?.temperature ?? 1;
  if (!(temperature > 0)) throw new Problem("manifest.json: calibration.temperature: is not valid");
  const applied = new URLSearchParams(location.search).get("threshold") !== "off";
  const value = threshold?.value ?? null;
  if (value !== null && threshold.score !== SCORE) throw new Problem(`manifest.json: threshold.score: is not ${SCORE}`);
  return { temperature, threshold: applied ? value : null, byClass: threshold?.classes ?? {} };
}

/** The graphs of the precision that the address asks for (index.html?precision=int8), or of the first. */
function chosenGraphs({ precisions }) {
  const selected = new URLSearchParams(location.search).get("precision") ?? Object.keys(precisions)[0];
  if (!Object.hasOwn(precisions, selected)) {
    throw new Problem(`manifest.json: precisions: not in the bundle: ${selected} (allowed: ${Object.keys(precisions).join(", ")})`);
  }
  const { classifier, optimization = "all" } = precisions[selected];
  return { precision: selected, classifier, optimization };
}

/** The content of a file, once its sha256 is the manifest's; unchecked where the browser offers no sha256. */
async function verifiedBytes(name, manifest, tick) {
  const expected = manifest.files[name]?.sha256;
  if (!expected) throw new Problem(`manifest.json: files: has no sha256 of ${name}`);
  const content = new Uint8Array(await (await fetched(name, tick)).arrayBuffer());
  if (!globalThis.crypto?.subtle) return content;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  if (Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") !== expected) {
    throw new Problem(`${name}: is not the file that was exported: its sha256 differs from that in manifest.json; export the bundle again`);
  }
  return content;
}

/** onnxruntime, from the bundle's own copy. */
async function loadRuntime() {
  const [code, binary] = await Promise.all(RUNTIME.map((name) => fetched(name)));
  // As a blob it is JavaScript whatever type the server gives it; many know no .mjs.
  const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  try {
    const ort = await import(url);
    ort.env.logLevel = "error";
    ort.env.wasm.numThreads = 1; // more need a server that isolates the page from other origins
    ort.env.wasm.wasmBinary = await binary.arrayBuffer();
    return ort;
  } finally {
    URL.revokeObjectURL(url);
  }
}

/** The numbers of a .npy file of float32, row by row, as numpy.save writes it. */
function numbersOf(npy) {
  const view = new DataView(npy.buffer, npy.byteOffset);
  const start = view.getUint8(6) === 1 ? 10 + view.getUint16(8, true) : 12 + view.getUint32(8, true);
  return new Float32Array(npy.slice(start).buffer);
}

/** What names pictures: the pre-processing, the class names, and a function from prepared pixels to logits. */
async function loadModel() {
  if (location.protocol === "file:") throw new Problem(OPENED_AS_A_FILE);
  const manifest = await readManifest();
  const { precision, classifier, optimization } = chosenGraphs(manifest);
  showManifest(manifest, precision);
  const total = manifest.files[classifier]?.bytes;
  const [ort, namesText, graph, vectors] = await Promise.all([
    loadRuntime(),
    verifiedBytes("classes.txt", manifest),
    verifiedBytes(classifier, manifest, (count) => showProgress(count, total)),
    manifest.memory === "candidates" ? verifiedBytes("class_vectors.npy", manifest) : null
  ]);
  const names = linesOf(new TextDecoder().decode(namesText));
  showStatus("Starting the model …");
  let session;
  try {
    session = await ort.InferenceSession.create(graph, {
      executionProviders: ["wasm"],
      graphOptimizationLevel: optimization
    });
  } catch (error) {
    throw new Problem(`${classifier}: this browser could not load it: ${error.message ?? error}`);
  }
  const inputs = {};
  if (vectors) {
    const numbers = numbersOf(vectors);
    inputs.class_vectors = new ort.Tensor("float32", numbers, [names.length, numbers.length / names.length]);
  }
  const { preprocessing, confidence } = manifest;
  return {
    preprocessing,
    confidence,
    names,
    async logits(input) {
      const image = new ort.Tensor("float32", input, [1, 3, preprocessing.size, preprocessing.size]);
      const answers = await session.run({ ...inputs, image });
      return answers[session.outputNames[0]].data;
    }
  };
}

/** The lines of a text, whose ends are those that Python's splitlines knows. */
function linesOf(text) {
  const lines = text.split(/\r\n|[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]/);
  return lines.at(-1) === "" ? lines.slice(0, -1) : lines;
}

/** The likeliest classes with their probabilities, softmax(logits / temperature), likeliest first. */
function likeliest(logits, names, temperature) {
  const most = logits.reduce((a, b) => Math.max(a, b));
  const weights = Array.from(logits, (logit) => Math.exp((logit - most) / temperature));
  const sum = weights.reduce((a, b) => a + b);
  return weights
    .map((weight, index) => ({ class: names[index], probability: weight / sum }))
    .sort((a, b) => b.probability - a.probability)
    .slice(0, TOP);
}

/** Whether a picture shows none of the classes, by its likeliest one; null if no threshold decides it. */
function isNone({ class: name, probability }, { threshold, byClass }) {
  if (threshold === null) return null;
  return probability < (Object.hasOwn(byClass, name) ? byClass[name] : threshold);
}

// --- what is shown --------------------------------------------------------------------------------------

function showStatus(text) {
  element("status").textContent = text;
}

function showProgress(count, total) {
  const megabytes = (bytes) => (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0);
  const whole = total >= count;
  element("progress").hidden = !whole;
  if (whole) {
    const percent = `${Math.round((100 * count) / total)}`;
    element("progress").setAttribute("aria-valuenow", percent);
    element("done").style.width = `${percent}%`;
  }
  showStatus(`Loading the model: ${megabytes(count)}${whole ? ` of ${megabytes(total)}` : ""} MB`);
}

function showManifest(manifest, precision) {
  const { recipe, data, classes, made_by: maker, test_top1_percent: score, preprocessing } = manifest;
  const count = classes && `${classes} ${classes === 1 ? "class" : "classes"}`;
  if (recipe) element("title").textContent = document.title = `${recipe}`;
  element("subtitle").textContent = [count, data && `learned from ${data}`].filter(Boolean).join(" · ");
  const checked = globalThis.crypto?.subtle
    ? "sha256 as in manifest.json"
    : "not checked: browsers compute sha256 on localhost and https pages only";
  const facts = {
    Model: recipe,
    Data: data,
    Classes: classes,
    "Top-1 on test images": typeof score === "number" ? `${score.toFixed(2)} %` : null,
    Input: `${preprocessing.size} x ${preprocessing.size} pixels`,
    Precision: precision,
    "None of these below": manifest.confidence.threshold === null ? null : `${(100 * manifest.confidence.threshold).toFixed(1)} %`,
    "Files checked": checked,
    "Made by": maker
  };
  for (const [name, value] of Object.entries(facts)) {
    if (value === undefined || value === null) continue;
    element("facts").append(
      Object.assign(document.createElement("dt"), { textContent: name }),
      Object.assign(document.createElement("dd"), { textContent: `${value}` })
    );
  }
  element("about").hidden = false;
}

function showPicture(file) {
  const picture = element("picture");
  URL.revokeObjectURL(picture.src);
  picture.src = URL.createObjectURL(file);
  picture.alt = file.name;
  fillStage(true);
}

/** Let the stage hold the picture, or invite to put one there. */
function fillStage(filled) {
  element("picture").hidden = !filled;
  element("invitation").hidden = filled;
  element("stage").classList.toggle("filled", filled);
}

function showClasses(image, classes, none) {
  const percent = (share) => (share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);
  const spoken = Object.assign(document.createElement("span"), { className: "unseen" });
  spoken.textContent = ` shows ${classes[0].class}, ${percent(classes[0].probability)}`;
  if (none) {
    spoken.textContent = `: the likeliest is ${classes[0].class}, ${percent(classes[0].probability)}`;
    element("none").textContent = `None of these: the most likely class has only ${percent(classes[0].probability)}, which is below its threshold`;
  }
  element("none").hidden = !none;
  element("status").replaceChildren(image, spoken);
  element("classes").replaceChildren(
    ...classes.map(({ class: name, probability }) => {
      const [line, label, share, track, bar] = ["li", "span", "span", "div", "div"].map((tag) =>
        document.createElement(tag)
      );
      Object.assign(label, { className: "name", textContent: name });
      Object.assign(share, { className: "share", textContent: percent(probability) });
      track.className = "track";
      bar.style.width = `${100 * probability}%`;
      track.append(bar);
      line.append(label, share, track);
      return line;
    })
  );
  element("classes").hidden = false;
}

function showProblem(error) {
  element("progress").hidden = true;
  element("classes").hidden = true;
  element("none").hidden = true;
  showStatus("");
  element("problem").textContent = error.message;
  element("problem").hidden = false;
}

/** Put a record where programs find it. */
function publish(record) {
  // "<" only as an escape: a class could be named like the end of the element.
  element("result").textContent = record ? JSON.stringify(record).replaceAll("<", "\\u003c") : "";
}

// --- pictures -------------------------------------------------------------------------------------------

const model = loadModel();
let latest = 0; // the number of the newest picture; an older one's answer is not shown
let running = Promise.resolve(); // onnxruntime takes one picture at a time

/** The record of a picture: its classes, or a Problem. */
async function classify(file) {
  const { preprocessing, confidence, names, logits } = await model;
  element("progress").hidden = true;
  showStatus("Looking …");
  await new Promise((painted) => setTimeout(painted, 30)); // what follows keeps the page from being drawn
  let bitmap;
  try {
    checkSize(...((await statedSize(file)) ?? [1, 1])); // before the browser decodes it
    bitmap = await decode(file);
  } catch (error) {
    if (error instanceof RangeError) throw new Problem(`${file.name}: ${error.message}`);
    throw new Problem(`${file.name}: could not be read as an image; browsers read ${KINDS}`);
  }
  try {
    const classes = likeliest(await logits(prepare(bitmap, preprocessing)), names, confidence.temperature);
    return { image: file.name, classes, none_of_these: isNone(classes[0], confidence) };
  } catch (error) {
    throw error instanceof RangeError ? new Problem(`${file.name}: ${error.message}`) : error;
  } finally {
    bitmap.close();
  }
}

/** Show a picture and, as soon as the model has loaded, what it shows. */
async function take(file) {
  const number = ++latest;
  publish(null);
  element("problem").hidden = true;
  element("classes").hidden = true;
  element("none").hidden = true;
  showPicture(file);
  const answer = running.then(() => (number === latest ? classify(file) : null));
  running = answer.catch(() => {});
  try {
    const record = await answer;
    if (number !== latest) return;
    showClasses(file.name, record.classes, record.none_of_these);
    publish(record);
  } catch (error) {
    if (number === latest) fail(error, file.name);
  }
}

function fail(error, image) {
  if (!(error instanceof Problem)) console.error(error);
  showProblem(error);
  publish({ ...(image && { image }), error: error.message });
}

/** The first picture among files that were dropped, pasted or chosen. */
function takeOneOf(files) {
  const file = [...files].find(({ type }) => type.startsWith("image/")) ?? files[0];
  if (file) take(file);
  return Boolean(file);
}

element("picture").addEventListener("load", ({ target }) => {
  target.classList.toggle("wide", target.naturalWidth * 3 > target.naturalHeight * 4); // than the stage, 4 : 3
});
element("picture").addEventListener("error", () => fillStage(false));
element("file").addEventListener("change", ({ target }) => {
  takeOneOf(target.files);
  target.value = ""; // the same file can be chosen again
});
element("choose").addEventListener("click", () => element("file").click());

document.addEventListener("paste", ({ clipboardData }) => takeOneOf(clipboardData.files));

document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", ({ relatedTarget }) => {
  if (!relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  if (!takeOneOf(event.dataTransfer.files)) {
    showProblem(new Problem("The dropped item is not a file; save the image first, or copy and paste it."));
  }
});

// --- the camera -----------------------------------------------------------------------------------------

async function offerCamera() {
  const devices = await navigator.mediaDevices.enumerateDevices();
  element("camera").hidden = !devices.some(({ kind }) => kind === "videoinput");
}

async function openCamera() {
  try {
    element("video").srcObject = await navigator.mediaDevices.getUserMedia({
      video: { facingMode: "environment", width: { ideal: 1280 }, height: { ideal: 960 } }
    });
    element("viewfinder").showModal();
  } catch (error) {
    showProblem(new Problem(`The camera could not be used: ${error.message}`));
  }
}

function closeCamera() {
  for (const track of element("video").srcObject.getTracks()) track.stop();
  element("video").srcObject = null;
}

function shoot() {
  const video = element("video");
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  element("viewfinder").close();
  canvas.toBlob((picture) => take(new File([picture], "camera.png", { type: "image/png" })));
}

// Browsers offer cameras to localhost and https pages only.
if (navigator.mediaDevices) {
  element("camera").addEventListener("click", openCamera);
  element("shoot").addEventListener("click", shoot);
  element("cancel").addEventListener("click", () => element("viewfinder").close());
  element("viewfinder").addEventListener("close", closeCamera);
  navigator.mediaDevices.addEventListener("devicechange", offerCamera);
  offerCamera();
}

// --- the start ------------------------------------------------------------------------------------------

/** The picture that the address names: index.html?image=fox.jpg, a file below the page's folder. */
async function takeNamed(name) {
  try {
    const content = await fetched(name);
    take(new File([content], name, { type: content.type }));
  } catch (error) {
    fail(error, name);
  }
}

const named = new URLSearchParams(location.search).get("image");
model.then(
  () => {
    element("progress").hidden = true;
    if (latest === 0) showStatus("Ready for a picture.");
  },
  (error) => fail(error, named)
);
if (named && location.protocol !== "file:") takeNamed(named);
