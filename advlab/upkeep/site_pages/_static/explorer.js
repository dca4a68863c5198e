// The panel of advlab.widgets without Python: what it shows was computed beforehand, by
// advlab.upkeep.explorer. Its files are scripts that call `Explorer.start` and `Explorer.take`,
// since a page that is opened from a disk may not fetch others.
"use strict";

const Explorer = (() => {
  const root = document.getElementById("explorer");
  const control = (name) => root.querySelector(`[name=${name}]`);
  const pages = new Map(); // by place of the image: its sprite as pixels, and the answers
  let about = null;

  function start(found) {
    about = found;
    const told = root.querySelector(".explorer-told");
    told.hidden = !about.told;
    told.textContent = about.told || "";
    if (about.told) return;
    fill("image", about.images.map((image, place) =>
      [place, `${about.classes[image.label]} (${image.index})`]));
    fill("source", about.models.map((name) => [name, name]));
    fill("attack", about.attacks.map((attack) => [attack.name, attack.name]));
    control("eps").max = about.eps.length - 1;
    root.querySelector("form").addEventListener("input", update);
    root.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
    control("random").addEventListener("click", () => {
      const other = Math.floor(Math.random() * (about.images.length - 1));
      control("image").value = other + (other >= Number(control("image").value));
      update();
    });
    root.querySelector(".explorer-panel").hidden = false;
    update();
  }

  function fill(name, options) {
    control(name).replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  }

  // Keep what a script of one image brought, and show it.
  async function take(page) {
    const sprite = new Image();
    sprite.src = page.sprite;
    await sprite.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [sprite.width, sprite.height];
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(sprite, 0, 0);
    pages.set(page.place, { ...page, context });
    update();
  }

  function load(place) {
    pages.set(place, null); // on its way
    const script = document.createElement("script");
    script.src = `_static/explorer/image${place}.js`;
    document.body.append(script);
  }

  // Offer the classes towards which the image can be moved, and keep the choice where it is one.
  function offerTargets(label) {
    const [select, before] = [control("target"), control("target").value];
    const others = about.classes.map((name, k) => [k, name]).filter(([k]) => k !== label);
    fill("target", others);
    if (others.some(([k]) => String(k) === before)) select.value = before;
    select.disabled = control("attack").value !== about.targeted;
  }

  function update() {
    const place = Number(control("image").value);
    const { label } = about.images[place];
    offerTargets(label);
    const eps = about.eps[control("eps").value];
    control("size").textContent = eps;
    control("eps").setAttribute("aria-valuetext", `${eps} of 255`);
    if (!pages.has(place)) load(place);
    if (pages.get(place)) show(pages.get(place), label, eps);
  }

  function show(page, label, eps) {
    const [attack, source] = [control("attack").value, control("source").value];
    const target = attack === about.targeted ? control("target").value : "";
    const made = page.made[`${attack}|${source}|${target}`];
    const step = about.eps.indexOf(eps);
    const still = { after: page.before, linf: 0, l2: 0, survives: true };
    const found = step ? made.at[step - 1] : still;
    const tile = step ? made.tile + step - 1 : null;
    draw(page, tile, eps, about.classes[label]);
    say(page, found, label, aim(attack, target, label));
    bars(page, found, label);
  }

  function aim(attack, target, label) {
    if (attack === about.targeted) return `towards ${about.classes[target]}`;
    const { gradient } = about.attacks.find((one) => one.name === attack);
    return gradient ? `away from ${about.classes[label]}` : "in random directions";
  }

  function pixels(page, tile) {
    const [side, columns] = [about.side, about.columns];
    const [left, top] = [(tile % columns) * side, Math.floor(tile / columns) * side];
    return page.context.getImageData(left, top, side, side);
  }

  // Draw the image, the change enlarged (grey where there is none), and their sum.
  function draw(page, tile, eps, name) {
    const original = pixels(page, 0);
    const [change, attacked] = [pixels(page, 0), pixels(page, 0)];
    const factor = Math.floor(127.5 / Math.max(eps, 1));
    const moved = tile === null ? null : pixels(page, tile).data;
    for (let i = 0; i < original.data.length; i++) {
      if (i % 4 === 3) continue; // opacity
      const by = moved ? moved[i] - 128 : 0;
      change.data[i] = 128 + factor * by;
      attacked.data[i] = original.data[i] + by;
    }
    put("original", original, "original", `The ${name} before the attack`);
    put("change", change, `change x ${factor} (grey: none)`, "What the attack changes, enlarged");
    put("attacked", attacked, `attacked, eps ${eps}/255`, `The ${name} after the attack`);
  }

  function put(view, image, caption, alt) {
    const canvas = root.querySelector(`[data-view=${view}]`);
    canvas.width = canvas.height = about.side;
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.setAttribute("aria-label", alt);
    canvas.parentElement.querySelector("figcaption").textContent = caption;
  }

  const likeliest = (shares) => shares.indexOf(Math.max(...shares));
  const percent = (share) => `${(share / 10).toFixed(0)} %`;

  function say(page, found, label, where) {
    const lines = about.models.map((name, m) => {
      const [before, after] = [likeliest(page.before[m]), likeliest(found.after[m])];
      const answer = `${about.classes[after]} (${percent(found.after[m][after])})`;
      return after === before ? `${name} says ${answer}.` : `${name} is fooled: it now says ${answer}.`;
    });
    root.querySelector(".explorer-verdict").textContent = lines.join(" ");
    root.querySelector(".explorer-numbers").textContent =
      `The attack moves ${where}. L-inf ${found.linf.toFixed(1)}/255, L2 ${found.l2.toFixed(2)}; ` +
      `the answer of ${about.models[0]} is ${found.survives ? "the same" : "another"} after saving in 8 bits. ` +
      `Data: ${about.data}.`;
  }

  function bars(page, found, label) {
    const cell = (kind, text) => Object.assign(document.createElement(kind), { textContent: text });
    const head = document.createElement("tr");
    head.append(cell("th", "class"), ...about.models.map((name) => cell("th", `${name}: before, after`)));
    for (const one of head.children) one.scope = "col";
    for (const one of [...head.children].slice(1)) one.colSpan = 2;
    root.querySelector(".explorer-bars thead").replaceChildren(head);
    const rows = about.classes.map((name, k) => {
      const row = document.createElement("tr");
      const first = cell("th", k === label ? `${name} (true)` : name);
      first.scope = "row";
      row.append(first);
      about.models.forEach((_, m) => {
        for (const [when, shares] of [["before", page.before[m]], ["after", found.after[m]]]) {
          const data = document.createElement("td");
          const bar = document.createElement("span");
          bar.className = `explorer-bar explorer-${when}`;
          bar.style.setProperty("--share", shares[k]);
          data.append(bar, ` ${percent(shares[k])}`);
          row.append(data);
        }
      });
      return row;
    });
    root.querySelector(".explorer-bars tbody").replaceChildren(...rows);
  }

  return { start, take };
})();
