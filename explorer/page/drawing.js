// Parts of the picture that need nothing but what is chosen.

// Lay a button over each cell of a grid, which shows that video alone.
export function drawCells(cells, state, change) {
  const [rows, columns] = state.grid.split("x").map(Number);
  const key = `${state.seed} ${state.grid}`;
  if (cells.dataset.key === key) return;
  cells.dataset.key = key;
  cells.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
  const seeds = rows * columns > 1 ? Array.from({ length: rows * columns }, (_, index) => Number(state.seed) + index) : [];
  cells.replaceChildren(
    ...seeds.map((seed) => {
      const button = document.createElement("button");
      button.textContent = seed;
      button.title = `See seed ${seed} alone`;
      button.onclick = (event) => (event.stopPropagation(), change({ seed: String(seed), grid: "1x1" }));
      return button;
    }),
  );
}

// 3 hours, 25 minutes and 45 seconds as 3:25:45.
export function timeOf(seconds) {
  const size = Math.abs(seconds);
  const two = (value) => String(Math.floor(value)).padStart(2, "0");
  const hours = Math.floor(size / 3600);
  return `${seconds < 0 ? "−" : ""}${hours ? `${hours.toLocaleString("en")}:` : ""}${two((size / 60) % 60)}:${two(size % 60)}`;
}
