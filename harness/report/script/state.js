// What the reader has set, by name: it lives in the address behind "#", so that a view is a link. #section?chip=h200&chip=b200&...
(() => {
  const values = new Map();
  const callbacks = [];
  const known = new Set();
  let section = "";
  let timer = 0;
  let pushing = false;
  let reads = null;

  function parsed(hash) {
    const [name, ...rest] = hash.replace(/^#/, "").split("?");
    const found = new Map();
    for (const [key, value] of new URLSearchParams(rest.join("?"))) found.set(key, [...(found.get(key) || []), value]);
    let target = name;
    try {
      target = decodeURIComponent(name);
    } catch {
      // An address that was cut off: it names no section.
    }
    return { name: target, found };
  }

  function hash() {
    const query = new URLSearchParams();
    for (const [name, list] of values) for (const value of list) query.append(name, value);
    const text = query.toString();
    return text ? `#${encodeURIComponent(section)}?${text}` : section ? `#${encodeURIComponent(section)}` : "";
  }

  // Browsers allow few changes of the address per second; a slider makes many.
  function write() {
    clearTimeout(timer);
    timer = 0;
    const wanted = hash();
    if (wanted !== location.hash) {
      // Without a state the address ends in "#": an empty one would load the page anew.
      if (pushing) history.pushState(null, "", wanted || "#");
      else history.replaceState(null, "", wanted || "#");
    }
    pushing = false;
  }

  function tell(changed) {
    if (changed.size) for (const callback of callbacks) callback(changed);
  }

  function restore() {
    const { name, found } = parsed(location.hash);
    const changed = new Set([...values.keys(), ...found.keys()].filter((key) => String(values.get(key)) !== String(found.get(key))));
    values.clear();
    for (const [key, list] of found) values.set(key, list);
    section = name;
    tell(changed);
    return changed;
  }

  const state = {
    // The first value of a name, or null.
    get: (name) => state.all(name)[0] ?? null,
    all(name) {
      known.add(name);
      if (reads) reads.add(name);
      return values.get(name) || [];
    },
    // value: a text, several, or null for none. replace: no entry of its own in the browser's history.
    set: (name, value, options = {}) => state.change({ [name]: value }, options),
    change(wanted, { replace = false } = {}) {
      const changed = new Set();
      for (const [name, value] of Object.entries(wanted)) {
        known.add(name);
        const list = value === null || value === undefined || value === "" ? [] : [value].flat().map(String);
        if (String(values.get(name) || []) === String(list)) continue;
        changed.add(name);
        if (list.length) values.set(name, list);
        else values.delete(name);
      }
      if (!changed.size) return;
      pushing = pushing || !replace;
      clearTimeout(timer);
      timer = setTimeout(write, 120);
      tell(changed);
    },
    // callback(names that changed, as a Set).
    on: (callback) => callbacks.push(callback),
    names: () => [...values.keys()],
    unknown: () => [...values.keys()].filter((name) => !known.has(name)),
    // The names that a function asks for, beside what it returns.
    watched(work) {
      const before = reads;
      reads = new Set();
      try {
        return [work(), reads];
      } finally {
        reads = before;
      }
    },
    link() {
      write();
      return location.href;
    },
    section: () => section,
    // To a section of the page, with all that is set.
    go(name, { push = true } = {}) {
      section = name;
      pushing = pushing || push;
      write();
      const target = name && document.getElementById(name);
      if (!target) return;
      for (let part = target.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
      target.scrollIntoView();
      if (!target.hasAttribute("tabindex")) target.setAttribute("tabindex", "-1");
      target.focus({ preventScroll: true });
    },
  };

  // An input with data-state is part of the state; at the value it came with it is not in the address.
  function given(input) {
    if (input.type === "checkbox") return input.checked === input.defaultChecked ? null : input.checked ? "1" : "0";
    const own = input.tagName === "SELECT" ? [...input.options].find((option) => option.defaultSelected)?.value ?? input.options[0]?.value : input.defaultValue;
    // A slider writes 3.6 for 3.60.
    return input.value === own || (input.type === "range" && Number(input.value) === Number(own)) ? null : input.value;
  }
  function fill(input) {
    const value = state.get(input.dataset.state);
    if (input.type === "checkbox") input.checked = value === null ? input.defaultChecked : value === "1";
    else if (input.type === "radio") input.checked = value === null ? input.defaultChecked : input.value === value;
    else if (input.tagName === "SELECT" && value === null) for (const [n, option] of [...input.options].entries()) option.selected = option.defaultSelected || n === 0;
    // What is no number would put a slider in its middle.
    else if (input.value !== value) input.value = value === null || (input.type === "range" && !(value.trim() && Number.isFinite(Number(value)))) ? input.defaultValue : value;
    if (input.tagName === "SELECT" && input.selectedIndex < 0) input.selectedIndex = 0;
    const output = input.id && document.querySelector(`output[for="${CSS.escape(input.id)}"]`);
    if (output) output.value = input.type === "range" ? Number(input.value).toFixed((input.step.split(".")[1] || "").length) : input.value;
  }
  state.controls = () => [...document.querySelectorAll("[data-state]")];
  state.start = () => {
    document.addEventListener("input", ({ target }) => {
      if (!target.dataset || !target.dataset.state) return;
      state.set(target.dataset.state, target.type === "radio" ? target.value : given(target), { replace: true });
    });
    state.on((changed) => state.controls().filter((input) => changed.has(input.dataset.state)).forEach(fill));
    addEventListener("popstate", () => { if (restore().size === 0) state.go(section, { push: false }); });
    addEventListener("hashchange", restore);
    document.addEventListener("click", (event) => {
      const link = event.target.closest && event.target.closest('a[href^="#"]');
      if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
      event.preventDefault();
      state.go(decodeURIComponent(link.getAttribute("href").slice(1)));
    });
    restore();
    state.controls().forEach(fill);
  };
  klab.state = state;
})();
