"use strict";
// The page's script, in the order core, state, filters, traces, plots, tables, evidence, derive_*, main. One global: klab.
window.klab = (() => {
  // Functions that compute again, from the rows that a filter leaves, what depends on all of them: klab.derive[name](figure, shown).
  const klab = { derive: {}, payload: { figures: {} } };
  klab.dims = ["chip", "model", "phase", "operator", "dtype", "kernel", "status"];

  // An element: properties, listeners under `on`, attributes under `with`; children are elements or texts, never HTML.
  klab.el = (tag, { on = {}, with: attributes = {}, ...properties } = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    for (const [name, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(name, value);
    for (const [name, listener] of Object.entries(on)) made.addEventListener(name, listener);
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  };

  const grouped = new Intl.NumberFormat("en-US");
  klab.count = (n) => grouped.format(n);
  klab.rows = (n) => `${klab.count(n)} ${n === 1 ? "row" : "rows"}`;
  klab.short = (text, most = 60) => (text.length > most ? `${text.slice(0, most - 1)}\u2026` : text);

  // Files leave by a link of the page itself: that works from a file on disk, and asks nobody.
  klab.download = (name, address) => {
    const link = klab.el("a", { href: address, download: name });
    document.body.append(link);
    link.click();
    link.remove();
  };

  // What the reader must know about this page in this browser.
  klab.say = (text) => {
    const main = document.querySelector("main") || document.body;
    main.prepend(klab.el("p", { className: "said", textContent: text, with: { role: "status" } }));
  };

  // The text of a packed element; null where there is none.
  klab.unpack = async (identity) => {
    const source = document.getElementById(identity);
    if (!source) return null;
    const packed = atob(source.textContent);
    const bytes = new Uint8Array(packed.length);
    for (let n = 0; n < packed.length; n += 1) bytes[n] = packed.charCodeAt(n);
    source.remove();
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };

  // A table of the payload: columns by name; {of, at} holds each distinct cell once and its place per row.
  klab.Table = class {
    constructor({ columns, length, values }) {
      Object.assign(this, { columns, length, values });
      this.dims = klab.dims.filter((dim) => columns.includes(dim));
    }

    coded(name) {
      return this.values[this.columns.indexOf(name)];
    }

    cell(row, column) {
      const values = this.values[column];
      return Array.isArray(values) ? values[row] : values.of[values.at[row]];
    }

    row(n) {
      return this.columns.map((_, column) => this.cell(n, column));
    }

    // Rows as derive functions and readers have them; made when first asked for.
    get rows() {
      if (!this.made) this.made = Array.from({ length: this.length }, (_, n) => this.row(n));
      return this.made;
    }
  };

  // Texts and numbers in an order that readers expect; what is not there comes last either way.
  const words = new Intl.Collator("en", { numeric: true });
  const absent = (value) => value === null || value === undefined || value === "" || (Array.isArray(value) && !value.length);
  const compared = (one, other) => {
    if (typeof one === "number" && typeof other === "number") return one - other;
    if (typeof one === "number" || typeof other === "number") return typeof one === "number" ? -1 : 1;
    return words.compare(String(one), String(other));
  };
  klab.compare = compared;
  // The places of `values` in order; equal ones stay as they were.
  klab.order = (values, down) => values.map((_, n) => n).sort((a, b) => {
    if (absent(values[a]) || absent(values[b])) return absent(values[a]) - absent(values[b]) || a - b;
    return (down ? -1 : 1) * compared(values[a], values[b]) || a - b;
  });

  return klab;
})();
