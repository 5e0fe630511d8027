// Tables: sorted by their heads, searched, filtered by the dimensions of their rows; the table behind a figure and its CSV.
(() => {
  const tables = new Map(); // element -> its rows and what is known of them
  // Rows laid out at once: a browser takes long over thousands, and a reader cannot use them.
  const FIRST = 100;
  const BEHIND = 500;
  const PRINTED = 60;

  // What a cell is sorted by. Words among numbers say why there is no number: they are not there, and come last either way.
  function value(cell) {
    const text = (cell.dataset.sort ?? cell.textContent).trim();
    const number = Number(text.replace(/,/g, ""));
    return text === "" ? null : Number.isFinite(number) ? number : cell.classList.contains("n") ? null : text;
  }

  function adopt(element) {
    const rows = [...element.tBodies[0].rows].map((tr) => ({ tr, dims: tr.dataset.dims ? JSON.parse(tr.dataset.dims) : {}, text: null, more: null, fits: true }));
    const having = new Set(rows.flatMap(({ dims }) => Object.keys(dims)));
    const one = { element, rows, having, order: rows, all: rows.length <= FIRST * 1.5, find: "" };
    tables.set(element, one);
    const wrapper = element.closest(".wide") || element;
    one.note = klab.el("p", { className: "note shown", with: { "aria-live": "polite" } });
    one.rest = klab.el("button", { type: "button", className: "rest", hidden: true, on: { click: () => { one.all = true; show(one); } } });
    wrapper.before(one.note);
    wrapper.after(one.rest);
    for (const row of rows.filter(({ tr }) => tr.dataset.evidence)) evident(one, row);
    if (!element.id) return;
    sortable(element, `sort.${element.id}`, () => sort(one));
    if (rows.length > 15) wrapper.before(search(one));
    sort(one);
  }

  function search(one) {
    const name = `find.${one.element.id}`;
    const field = klab.el("input", { type: "search", placeholder: `Find in ${klab.rows(one.rows.length)}`, with: { "aria-label": "Find in this table" }, on: { input: () => klab.state.set(name, field.value, { replace: true }) } });
    const found = (changed) => {
      if (changed && !changed.has(name)) return;
      one.find = (klab.state.get(name) || "").trim().toLowerCase();
      if (field.value !== (klab.state.get(name) || "")) field.value = klab.state.get(name) || "";
      show(one);
    };
    klab.state.on(found);
    found();
    return klab.el("div", { className: "find" }, field);
  }

  // Heads become buttons: up, down, and the order of the page again. The state has "column:up" or "column:down". Without `sorted`, the
  // table is made anew whenever its order changes.
  function sortable(element, name, sorted = null) {
    const heads = [...element.tHead.rows[0].cells];
    const titles = heads.map((head) => head.textContent);
    element.classList.add("sorts");
    heads.forEach((head, n) => {
      const next = () => {
        const [column, way] = chosen(name, titles);
        klab.state.set(name, column !== n ? `${titles[n]}:up` : way === "up" ? `${titles[n]}:down` : null);
      };
      head.replaceChildren(klab.el("button", { type: "button", textContent: titles[n], on: { click: next } }));
    });
    const mark = (changed) => {
      if (changed && !changed.has(name)) return;
      const [column, way] = chosen(name, titles);
      heads.forEach((head, n) => {
        if (n === column) head.setAttribute("aria-sort", way === "up" ? "ascending" : "descending");
        else head.removeAttribute("aria-sort");
      });
      if (changed) sorted();
    };
    if (sorted) klab.state.on(mark);
    mark();
  }

  // [place of the column, way], [-1, ""] where nothing is chosen or no column is called so.
  function chosen(name, titles) {
    const text = klab.state.get(name) || "";
    const cut = text.lastIndexOf(":");
    const column = titles.indexOf(text.slice(0, cut));
    const way = text.slice(cut + 1);
    return column < 0 || !["up", "down"].includes(way) ? [-1, ""] : [column, way];
  }

  function sort(one) {
    const titles = [...one.element.tHead.rows[0].cells].map((head) => head.textContent);
    const [column, way] = chosen(`sort.${one.element.id}`, titles);
    one.order = column < 0 ? one.rows : klab.order(one.rows.map(({ tr }) => value(tr.cells[column])), way === "down").map((n) => one.rows[n]);
    one.element.tBodies[0].append(...one.order.flatMap(({ tr, more }) => (more ? [tr, more] : [tr])));
    show(one);
  }

  // Which rows are seen: those that pass filter and search, and of many the first.
  function show(one) {
    let left = 0;
    for (const row of one.order) {
      if (one.find && row.text === null) row.text = row.tr.textContent.toLowerCase();
      const seen = row.fits && (!one.find || row.text.includes(one.find));
      left += seen;
      const hidden = !seen || (!one.all && left > FIRST);
      if (row.tr.hidden !== hidden) row.tr.hidden = hidden;
      if (row.more) row.more.hidden = hidden;
    }
    const cut = !one.all && left > FIRST;
    one.rest.hidden = !cut;
    if (cut) one.rest.textContent = `Show all ${klab.rows(left)} (the first ${FIRST} are shown)`;
    const lacking = one.having.size ? klab.filters.lacking(one.having) : [];
    const said = left < one.rows.length ? [`${klab.count(left)} of ${klab.rows(one.rows.length)} shown.`] : [];
    if (lacking.length) said.push(`Not filtered by ${lacking.join(", ")}: this table has no such column.`);
    one.note.textContent = said.join(" ");
  }

  // A row that has more to tell: a button in its first cell opens a row below it, which klab.evidence fills. One is open at a time.
  function evident(one, row) {
    const identity = row.tr.dataset.evidence;
    const button = klab.el("button", {
      type: "button", className: "evidence", textContent: "evidence", with: { "aria-expanded": "false", "aria-label": `Evidence: ${klab.short(row.tr.cells[0].textContent, 80)}` },
      on: { click: () => klab.state.set("open", klab.state.get("open") === identity ? null : identity) },
    });
    row.tr.cells[0].append(button);
    row.open = () => {
      const open = klab.state.get("open") === identity;
      button.setAttribute("aria-expanded", String(open));
      if (open === Boolean(row.more)) return;
      if (!open) {
        row.more.remove();
        row.more = null;
        return;
      }
      const cell = klab.el("td", { colSpan: row.tr.cells.length });
      row.more = klab.el("tr", { className: "more" }, cell);
      row.tr.after(row.more);
      row.more.hidden = row.tr.hidden;
      if (klab.evidence) klab.evidence(identity, cell);
      else cell.textContent = "There is no evidence of this row in this page.";
    };
  }
  const open = () => { for (const { rows } of tables.values()) for (const row of rows) if (row.open) row.open(); };

  // A table behind a figure, under the filter and in the order chosen; made when it is opened.
  function behind(plot) {
    const details = plot.box.querySelector("details.behind");
    if (!details || !plot.table || !details.open) return;
    const { table, shown, identity } = plot;
    const rows = shown ? shown.rows : Array.from({ length: table.length }, (_, n) => n);
    const [column, way] = chosen(`sort.${identity}`, table.columns);
    const order = column < 0 ? rows : klab.order(rows.map((n) => table.cell(n, column)), way === "down").map((n) => rows[n]);
    const numbers = table.values.map((list) => Array.isArray(list) && list.some((one) => typeof one === "number"));
    const most = klab.plots.printing ? PRINTED : BEHIND;
    const line = (n) => klab.el("tr", {}, ...table.row(n).map((cell, at) => klab.el("td", { className: numbers[at] ? "n" : "", textContent: told(cell) })));
    const head = klab.el("tr", {}, ...table.columns.map((name, at) => klab.el("th", { textContent: name, className: numbers[at] ? "n" : "", scope: "col" })));
    const body = klab.el("table", {}, klab.el("thead", {}, head), klab.el("tbody", {}, ...order.slice(0, most).map(line)));
    // Focus stays on the head that was pressed.
    const pressed = [...details.querySelectorAll("th button")].indexOf(document.activeElement);
    sortable(body, `sort.${identity}`);
    const note = order.length > most ? [klab.el("p", { className: "note", textContent: `The first ${most} of ${klab.rows(order.length)}; the CSV has them all.` })] : [];
    details.replaceChildren(details.querySelector("summary"), ...note, klab.el("div", { className: "wide plain", tabIndex: 0, with: { role: "region", "aria-label": "Table behind the figure" } }, body));
    if (pressed >= 0) body.querySelectorAll("th button")[pressed].focus();
  }

  // The CSV has every digit; a reader needs fewer.
  const told = (cell) => (typeof cell === "number" && !Number.isInteger(cell) ? String(Number(cell.toPrecision(8))) : text(cell));
  const text = (cell) => (Array.isArray(cell) ? cell.join(", ") : cell === null ? "" : String(cell));

  // RFC 4180. A spreadsheet runs a text that begins like a formula: an apostrophe makes it a text; numbers stay numbers.
  function field(cell) {
    let one = text(cell);
    if (typeof cell !== "number" && /^[=+\-@\t\r]/.test(one) && !/^[+-]?\d+(\.\d+)?(e[+-]?\d+)?$/i.test(one)) one = `'${one}`;
    return /[",\r\n]/.test(one) ? `"${one.replaceAll('"', '""')}"` : one;
  }
  function csv(identity) {
    const { table, shown } = klab.plots.get(identity);
    const rows = shown ? shown.rows : Array.from({ length: table.length }, (_, n) => n);
    return [table.columns, ...rows.map((n) => table.row(n))].map((row) => `${row.map(field).join(",")}\r\n`).join("");
  }

  klab.tables = {
    csv, behind,
    // The dimensions of every row of the page's own tables.
    dims: () => [...tables.values()].flatMap(({ rows }) => rows.map(({ dims }) => dims)),
    filter() {
      const active = klab.filters.active();
      for (const one of tables.values()) {
        if (!one.having.size) continue;
        for (const row of one.rows) row.fits = klab.filters.fits(row.dims, one.having, active);
        show(one);
      }
    },
    open,
    // Whether a row has this evidence.
    opens: (identity) => [...tables.values()].some(({ rows }) => rows.some(({ tr }) => tr.dataset.evidence === identity)),
    start() {
      for (const element of document.querySelectorAll("main table")) {
        if (element.tBodies[0] && element.tHead && !element.closest("details.behind") && (element.id || element.querySelector("tr[data-dims], tr[data-evidence]"))) adopt(element);
      }
      klab.state.on((changed) => {
        if (changed.has("open")) open();
        for (const plot of klab.plots.plots.values()) if (changed.has(`sort.${plot.identity}`)) behind(plot);
      });
    },
  };
})();
