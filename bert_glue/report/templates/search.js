// A search field above each long table. It only hides rows of this page and sends nothing.
for (const table of document.querySelectorAll("table.searched")) {
  const rows = table.tBodies[0].rows;
  const field = table.closest(".scroll").previousElementSibling;
  field.hidden = false;
  field.querySelector("input").addEventListener("input", (event) => {
    const wanted = event.target.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}
