"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const names = ["dataset", "number", "label", "text", "confidence", "right", "length", "similarity", "sprite", "row",
    "vision", "language", "alignment", "confusions"];
  const words = data.words.map((row) => Object.fromEntries(names.map((name, place) => [name, row[place]])));
  for (const word of words) {
    word.searched = `${word.label}\n${word.text}`.toLowerCase();
    word.chance = Math.random();
  }
  const orders = {
    worst: (a, b) => a.right - b.right || a.similarity - b.similarity || b.length - a.length || b.confidence - a.confidence,
    random: (a, b) => a.chance - b.chance,
    sure: (a, b) => a.right - b.right || b.confidence - a.confidence,
    unsure: (a, b) => a.confidence - b.confidence,
    index: () => 0,
  };
  const PAGE = 36;  // cards that are added at once
  const form = document.getElementById("filter");
  const cards = document.getElementById("cards");
  const more = document.getElementById("more");
  const found = document.getElementById("found");
  let chosen = [];
  let shown = 0;
  let confusion = null;

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function update() {
    const values = Object.fromEntries(new FormData(form));
    const text = values.text.trim().toLowerCase();
    const shortest = Number(values.shortest) || 0;
    const longest = Number(values.longest) || Infinity;
    chosen = words.filter((word) =>
      (!text || word.searched.includes(text)) &&
      (!values.wrong || !word.right) &&
      (values.dataset === "" || word.dataset === Number(values.dataset)) &&
      word.length >= shortest && word.length <= longest &&
      (!confusion || word.confusions.includes(confusion)));
    chosen.sort(orders[values.order]);
    const wrong = chosen.reduce((sum, word) => sum + 1 - word.right, 0);
    const part = confusion ? ` with ${confusion.split(data.between).map((each) => each || "∅").join(" → ")}` : "";
    found.textContent = `${chosen.length.toLocaleString("en")} of ${words.length.toLocaleString("en")} words${part}, ` +
      `${wrong.toLocaleString("en")} wrong`;
    cards.replaceChildren();
    shown = 0;
    extend();
  }

  function extend() {
    const added = chosen.slice(shown, shown + PAGE).map(card);
    cards.append(...added);
    shown += added.length;
    more.hidden = shown >= chosen.length;
  }

  // One image of a sprite, scaled; `layer` counts the images of a word from the left.
  function tile(word, layer, scale) {
    const { width, height, layers } = data.layout;
    const made = element("div", "tile");
    made.setAttribute("role", "img");
    made.setAttribute("aria-label", `${layers[layer]}: ${word.label}`);
    const column = width + 2 * data.margin, line = height + 2 * data.margin;
    const x = layer * column + data.margin, y = word.row * line + data.margin;
    made.style.cssText = `width:${width * scale}px;height:${height * scale}px;` +
      `background-image:url("images/words-${data.sprites[word.sprite]}.jpg");` +
      `background-size:${layers.length * column * scale}px auto;background-position:${-x * scale}px ${-y * scale}px`;
    return made;
  }

  // The word with the attention of one step laid over it.
  function step(word, number, scale) {
    const made = tile(word, 0, scale);
    const [rows, columns] = data.layout.cells;
    const cellWidth = data.layout.width / columns * scale, cellHeight = data.layout.height / rows * scale;
    const over = element("i");
    const tileWidth = columns + 2 * data.cellMargin, tileHeight = rows + 2 * data.cellMargin;
    const x = number * tileWidth + data.cellMargin, y = word.row * tileHeight + data.cellMargin;
    const sprite = attention(word.sprite);
    over.style.backgroundImage = `url("${sprite.url}")`;
    over.style.backgroundPosition = `${-x * cellWidth}px ${-y * cellHeight}px`;
    sprite.size.then(([w, h]) => { over.style.backgroundSize = `${w * cellWidth}px ${h * cellHeight}px`; });
    made.append(over);
    return made;
  }

  const sizes = new Map();
  function attention(number) {
    const url = `images/attention-${data.sprites[number]}.png`;
    if (!sizes.has(url)) {
      sizes.set(url, new Promise((resolve) => {
        const image = new Image();
        image.onload = () => resolve([image.naturalWidth, image.naturalHeight]);
        image.src = url;
      }));
    }
    return { url, size: sizes.get(url) };
  }

  // What the protocol compares of a character: nothing of those that do not count.
  function counted(character) {
    const folded = data.folds ? character.toLowerCase() : character;
    return data.characters.includes(folded) ? folded : "";
  }

  // The prediction with its mistakes marked, by the cheapest edits from the label.
  function marked(word) {
    const made = element("div", "prediction");
    if (word.right || !word.text) {
      made.textContent = word.text || "∅";
      return made;
    }
    const written = [...word.text].map((character) => [character, counted(character)]);
    const edits = alignment([...word.label].map(counted).filter(Boolean), written.map((each) => each[1]).filter(Boolean));
    const add = (character, kind) => made.append(kind ? element("span", kind, character) : character);
    let place = 0;
    for (const kind of edits) {
      if (kind === "gap") {
        add("‸", kind);
        continue;
      }
      while (!written[place][1]) add(written[place++][0], "");
      add(written[place++][0], kind);
    }
    while (place < written.length) add(written[place++][0], "");
    return made;
  }

  // For each character of `to` "" or "mistake", with a "gap" wherever one of `from` is missing.
  function alignment(from, to) {
    const wide = to.length + 1;
    const cost = new Uint16Array((from.length + 1) * wide);
    for (let i = 0; i <= from.length; i++) {
      for (let j = 0; j <= to.length; j++) {
        cost[i * wide + j] = !i ? j : !j ? i : Math.min(
          cost[(i - 1) * wide + j] + 1,
          cost[i * wide + j - 1] + 1,
          cost[(i - 1) * wide + j - 1] + (from[i - 1] !== to[j - 1]));
      }
    }
    const result = [];
    let i = from.length, j = to.length;
    while (i || j) {
      const here = cost[i * wide + j];
      if (i && j && here === cost[(i - 1) * wide + j - 1] + (from[i - 1] !== to[j - 1])) {
        i -= 1; j -= 1;
        result.unshift(from[i] === to[j] ? "" : "mistake");
      } else if (j && here === cost[i * wide + j - 1] + 1) {
        j -= 1;
        result.unshift("mistake");
      } else {
        i -= 1;
        result.unshift("gap");
      }
    }
    return result;
  }

  function card(word) {
    const made = element("article", `card ${word.right ? "right" : "wrong"}`);
    const button = element("button");
    button.type = "button";
    button.setAttribute("aria-expanded", "false");
    if (word.sprite >= 0) {
      button.append(tile(word, 0, 2));
      if (data.layout.layers.length > 1) {
        const masks = element("div", "masks");
        for (let layer = 1; layer < data.layout.layers.length; layer++) {
          const mask = tile(word, layer, 0.98);
          mask.title = data.layout.layers[layer];
          masks.append(mask);
        }
        button.append(masks);
      }
    }
    button.append(marked(word), element("div", "true", word.label));
    const meta = element("div", "meta");
    meta.append(
      element("span", "mark", word.right ? "✓ right" : "✗ wrong"),
      element("span", "", `${(word.confidence / 100).toFixed(1)} % sure`),
      element("span", "", `${data.datasets[word.dataset]} #${word.number}`));
    button.append(meta);
    button.addEventListener("click", () => toggle(made, button, word));
    made.append(button);
    if (form.elements.open.checked) toggle(made, button, word);
    return made;
  }

  function toggle(made, button, word) {
    const open = made.classList.toggle("open");
    button.setAttribute("aria-expanded", String(open));
    if (open && !made.querySelector(".more")) made.append(details(word));
    const part = made.querySelector(".more");
    if (part) part.hidden = !open;
  }

  function details(word) {
    const made = element("div", "more");
    made.append(predictions(word));
    if (data.attention && word.sprite >= 0) {
      const part = element("div");
      const steps = element("div", "steps");
      [...word.text, "end"].forEach((character, number) => {
        const figure = element("figure");
        figure.append(step(word, number, innerWidth < 640 ? 1.1 : 1.5), element("figcaption", "", character));
        steps.append(figure);
      });
      part.append(element("h3", "", "attention"), steps);
      made.append(part);
    }
    return made;
  }

  function predictions(word) {
    const part = element("div");
    const table = element("table");
    const rounds = Math.max(word.language.length, word.alignment.length);
    const text = (prediction) => (prediction === 0 ? word.text : prediction);
    const add = (heading, ...values) => {
      const line = table.insertRow();
      line.append(element("th", "", heading));
      for (const value of values) {
        const cell = element("td", value === word.text ? "" : "off", value === "" ? "∅" : value);
        line.append(cell);
      }
    };
    if (rounds > 1) {
      const line = table.createTHead().insertRow();
      line.append(element("th"));
      for (let number = 1; number <= rounds; number++) line.append(element("th", "", `round ${number}`));
    }
    if (word.vision !== null) add("vision", text(word.vision));
    if (word.language.length) add("language", ...word.language.map(text));
    if (word.alignment.length) add("alignment", ...word.alignment.map(text));
    part.append(element("h3", "", "predictions"), table);
    return part;
  }

  function choose(button) {
    confusion = button && button.dataset.confusion !== confusion ? button.dataset.confusion : null;
    for (const each of document.querySelectorAll("#confusions button")) {
      each.setAttribute("aria-pressed", String(each.dataset.confusion === confusion));
    }
    update();
    if (confusion) document.getElementById("words").scrollIntoView();
  }

  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => choose(null)));
  for (const button of document.querySelectorAll("#confusions button")) {
    button.addEventListener("click", () => choose(button));
  }
  new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting) && shown < chosen.length) extend();
  }, { rootMargin: "600px" }).observe(more);
  update();
})();
