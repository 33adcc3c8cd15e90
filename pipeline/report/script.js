// The page is whole without this. It shows at once what the columns of a chart tell, and opens all details in print.
for (const plot of document.querySelectorAll(".plot")) {
  const tip = plot.appendChild(document.createElement("output"));
  for (const column of plot.querySelectorAll(".hit")) {
    const title = column.querySelector("title");
    const lines = title.textContent;
    title.remove();
    column.setAttribute("aria-label", lines);
    column.addEventListener("pointerenter", () => {
      const box = column.getBoundingClientRect(), whole = plot.getBoundingClientRect();
      const middle = box.left + box.width / 2 - whole.left, onRight = middle > whole.width / 2;
      tip.textContent = lines;
      tip.style.left = onRight ? "auto" : middle + 12 + "px";
      tip.style.right = onRight ? whole.width - middle + 12 + "px" : "auto";
    });
  }
  plot.addEventListener("pointerleave", () => (tip.textContent = ""));
}
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const details of closed) details.open = true;
});
addEventListener("afterprint", () => {
  for (const details of closed) details.open = false;
});
