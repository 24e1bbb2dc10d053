"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  // A link to a part opens it.
  const open = () => {
    const part = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (part && part.matches("details")) { part.open = true; part.scrollIntoView(); }
  };
  addEventListener("hashchange", open);
  all("nav a").forEach((link) => link.addEventListener("click", () => setTimeout(open)));
  open();
  const parts = all("details");
  const unfold = document.getElementById("unfold");
  unfold.hidden = false;
  unfold.addEventListener("click", () => {
    const closed = all("details.section:not([open])").length > 0;
    all("details.section").forEach((part) => { part.open = closed; });
    unfold.textContent = closed ? "Close all" : "Open all";
  });
  // Paper has no folds.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = parts.filter((part) => !part.open);
    folded.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => folded.forEach((part) => { part.open = false; }));
  // Commands are copied.
  all(".copy").forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const code = button.previousElementSibling;
      getSelection().selectAllChildren(code);
      try { await navigator.clipboard.writeText(code.textContent); button.textContent = "Copied"; }
      catch { button.textContent = document.execCommand("copy") ? "Copied" : "Selected"; }
    });
  });
  // Tables are sorted by a column: numbers by their value, the rest as text; what is empty comes last.
  const key = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text.replace(/,/g, ""));
    return { text, number, none: text === "" };
  };
  all("table.sortable").forEach((table) => all("th", table).forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      all("th", table).forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => ({ row, ...key(row, column) }));
      const numbers = rows.every((each) => each.none || !Number.isNaN(each.number));
      rows.sort((a, b) => a.none - b.none
        || sign * (numbers ? a.number - b.number : a.text.localeCompare(b.text, "en", { numeric: true })));
      body.append(...rows.map((each) => each.row));
    });
  }));
  // What a mark of a figure stands for is shown at once, on a touch too.
  const shown = document.getElementById("hover");
  const show = (event) => {
    const mark = event.target.closest && event.target.closest("svg *");
    let holder = mark;
    while (holder && !holder.matches("svg") && !holder.querySelector(":scope > title")) holder = holder.parentElement;
    const title = holder && !holder.matches("svg") && holder.querySelector(":scope > title");
    shown.hidden = !title;
    if (!title) return;
    shown.textContent = title.textContent;
    const { offsetWidth: width, offsetHeight: height } = shown;
    shown.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - width - 4))}px`;
    shown.style.top = `${Math.max(4, event.clientY - height - 10)}px`;
  };
  addEventListener("pointermove", show);
  addEventListener("pointerdown", show);
  addEventListener("scroll", () => { shown.hidden = true; }, { passive: true });
})();
