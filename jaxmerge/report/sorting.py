"""The script of a page that sorts tables: click a heading to sort, a third click restores."""

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], rows = [...body.rows];
  if (rows.length < 3) continue;
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => {
    const text = row.cells[i].textContent.trim().replaceAll(",", "").replaceAll("\\u2212", "-");
    if (text === "" || text === "\\u2013") return null;
    return isNaN(parseFloat(text)) ? text : parseFloat(text);
  };
  const order = (a, b) => a === null || b === null ? (a === null) - (b === null)
    : typeof a === "number" && typeof b === "number" ? b - a : String(a).localeCompare(String(b));
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    button.title = "Sort by this column";
    head.append(button);
    button.onclick = () => {
      const state = head.ariaSort;
      for (const other of heads) other.ariaSort = null;
      const number = rows.some(row => typeof value(row, i) === "number");
      const names = number ? ["descending", "ascending"] : ["ascending", "descending"];
      head.ariaSort = state === names[0] ? names[1] : state === names[1] ? null : names[0];
      const sign = head.ariaSort === names[1] ? -1 : 1;
      const sorted = head.ariaSort === null ? rows : [...rows].sort((x, y) => {
        const a = value(x, i), b = value(y, i);
        return a === null || b === null ? order(a, b) : sign * order(a, b);
      });
      body.append(...sorted);
    };
  });
}
"""
STYLE = """
thead button { all: unset; cursor: pointer; }
thead button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
thead button::after { content: "\\2195"; opacity: .35; margin-left: .25em; }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
@media print { thead button::after { content: ""; } }
"""
