// the page of a plan: rows of models whose name has the text that was typed
themeButton();

const rows = [...document.querySelectorAll("#units tbody tr")];

$("filter").addEventListener("input", () => {
  const wanted = $("filter").value.trim().toLowerCase();
  let n = 0;
  for (const row of rows) {
    const name = `${row.cells[0].textContent} ${row.cells[1].textContent}`.toLowerCase();
    row.hidden = !name.includes(wanted);
    n += !row.hidden;
  }
  $("shown").textContent = wanted ? `${n} of ${rows.length} rows` : "";
});
