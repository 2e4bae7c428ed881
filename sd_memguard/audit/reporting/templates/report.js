"use strict";
(() => {
  const SHOWN_AT_FIRST = 24;
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("audit-data").textContent);

  // float32 values, ascending, as base64 of their little-endian bytes.
  const unpack = (text) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Float32Array.from({ length: bytes.length / 4 }, (_, index) => view.getFloat32(4 * index, true));
  };
  const unpackAll = (packed) => new Map(Object.entries(packed).map(([key, text]) => [key, unpack(text)]));
  const similarities = unpackAll(data.similarities);
  const background = unpackAll(data.background);

  // Compared in float32, as the audit does.
  const isCopy = (similarity, threshold) => Math.fround(similarity) >= Math.fround(threshold);

  const countCopies = (values, threshold) => {
    let low = 0;
    let high = values.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (isCopy(values[middle], threshold)) high = middle;
      else low = middle + 1;
    }
    return values.length - low;
  };

  // The same words as `percent` in sentences.py.
  const percent = (share) => {
    if (share === 0 || share === 1) return `${100 * share}%`;
    if (share < 0.001) return "under 0.1%";
    if (share > 0.999) return "over 99.9%";
    if (share >= 0.01 && share <= 0.99) return `${Math.floor(share * 100 + 0.5)}%`;
    const tenths = Math.floor(share * 1000 + 0.5);
    return `${Math.floor(tenths / 10)}.${tenths % 10}%`;
  };

  const slider = byId("threshold");
  const pairs = [...document.querySelectorAll(".pair")];
  const counted = [...document.querySelectorAll("[data-copies], [data-share], [data-background]")];
  // At the stated threshold the page says what the audit counted, to the letter.
  const stated = new Map(counted.map((element) => [element, element.textContent]));

  const textAt = (element, threshold) => {
    const { copies, share, background: kind } = element.dataset;
    const values = kind ? background.get(kind) : similarities.get(copies ?? share);
    if (!values || !values.length) return stated.get(element);
    const count = countCopies(values, threshold);
    return copies ? String(count) : percent(count / values.length);
  };

  const summary = () =>
    data.models
      .map((name, index) => {
        const own = [...document.querySelectorAll("[data-copies]")].filter((element) =>
          element.dataset.copies.startsWith(`${index}.`));
        const copies = own.reduce((sum, element) => sum + Number(element.textContent), 0);
        const total = own.reduce((sum, element) => sum + (similarities.get(element.dataset.copies)?.length ?? 0), 0);
        return `${name} ${copies} of ${total}`;
      })
      .join(" · ");

  const apply = (threshold, isStated) => {
    byId("threshold-value").textContent = threshold.toFixed(3);
    slider.setAttribute("aria-valuetext", threshold.toFixed(3));
    byId("reset").disabled = isStated;
    for (const element of counted) {
      element.textContent = isStated ? stated.get(element) : textAt(element, threshold);
    }
    const share = (threshold - data.low) / (data.high - data.low);
    const position = `${100 * Math.min(Math.max(share, 0), 1)}%`;
    for (const line of document.querySelectorAll(".plot .line")) {
      line.setAttribute("x1", position);
      line.setAttribute("x2", position);
    }
    for (const area of document.querySelectorAll(".plot .beyond")) area.setAttribute("x", position);
    for (const pair of pairs) {
      const { copy, similarity } = pair.dataset;
      pair.classList.toggle("is-copy", isStated ? copy === "1" : isCopy(Number(similarity), threshold));
    }
    byId("live").textContent = data.models.length <= 4 ? summary() : "";
    filter();
  };

  let limit = SHOWN_AT_FIRST;
  const filter = () => {
    const model = byId("filter-model").value;
    const kind = byId("filter-kind").value;
    const copiesOnly = byId("filter-copies").checked;
    const fitting = pairs.filter((pair) =>
      (!model || pair.dataset.model === model) &&
      (!kind || pair.dataset.kind === kind) &&
      (!copiesOnly || pair.classList.contains("is-copy")));
    const visible = new Set(fitting.slice(0, limit));
    for (const pair of pairs) pair.hidden = !visible.has(pair);
    byId("filtered").textContent = `${visible.size} of ${fitting.length} pairs`;
    byId("more").hidden = visible.size === fitting.length;
    byId("more").textContent = `Show ${Math.min(SHOWN_AT_FIRST, fitting.length - visible.size)} more`;
  };

  const refilter = () => {
    limit = SHOWN_AT_FIRST;
    filter();
  };
  const reset = () => {
    slider.value = data.threshold;
    apply(data.threshold, true);
  };

  slider.addEventListener("input", () => apply(Number(slider.value), false));
  byId("reset").addEventListener("click", () => {
    reset();
    slider.focus();
  });
  for (const id of ["filter-model", "filter-kind", "filter-copies"]) byId(id).addEventListener("change", refilter);
  byId("more").addEventListener("click", () => {
    const first = pairs.filter((pair) => !pair.hidden).length;
    limit += SHOWN_AT_FIRST;
    filter();
    const next = pairs.filter((pair) => !pair.hidden)[first];
    next.tabIndex = -1;
    next.focus({ preventScroll: true });
  });
  // Paper has no button to press.
  window.addEventListener("beforeprint", () => {
    limit = Infinity;
    filter();
  });

  byId("threshold-bar").hidden = false;
  byId("filters").hidden = false;
  reset();
})();
