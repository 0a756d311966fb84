// Moves the cut of the map in the AMP chapter. The page holds the plans that the library made; nothing is computed here.
document.addEventListener("DOMContentLoaded", () => {
  for (const figure of document.querySelectorAll(".head-map")) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const slider = figure.querySelector("input[type=range]");
    const squares = [...figure.querySelectorAll(".head")];
    const perBlock = squares.length / Object.values(data.gone)[0].length;
    const percent = (share, digits) => `${(100 * share).toFixed(digits)} %`;

    function show() {
      const split = figure.querySelector("input[type=radio]:checked").value;
      const [heads, neurons, fraction, lostHeads, lostNeurons] = data.steps[split][slider.value];
      squares.forEach((square, i) =>
        square.classList.toggle("gone", data.gone[heads][Math.floor(i / perBlock)].includes(i % perBlock)));
      const curtain = figure.querySelector(".curtain");
      for (const part of [curtain, figure.querySelector(".veil")])
        part.setAttribute("width", curtain.dataset.width * neurons / data.neurons_of_a_block);
      figure.querySelector("output").textContent = `${slider.value} %`;
      slider.setAttribute("aria-valuetext", `${slider.value} percent`);
      const number = (n) => n.toLocaleString("en");
      figure.querySelector(".said").textContent =
        `${percent(fraction, 1)} of all parameters: ${heads} of ${perBlock} heads and ${number(neurons)} of ` +
        `${number(data.neurons_of_a_block)} neurons of every block. With them go ${percent(lostHeads, 0)} of the ` +
        `heads' and ${percent(lostNeurons, 0)} of the neurons' importance.`;
    }

    figure.classList.add("alive");  // the controls appear: without this script they would do nothing
    figure.addEventListener("input", show);
    show();
  }
});
