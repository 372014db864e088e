// The words for names that occur in the data files. Nothing else in these scripts spells them out.
"use strict";

const labels = {
  /** What became of a feature, by its letter in data/links. */
  fates: {
    k: "kept",
    d: "drifted",
    r: "replaced",
    x: "died",
    b: "born",
    "-": "silent",
  },
  /** How an SAE was carried to a layer that it was not trained on. */
  methods: {
    identity: "as it is (plain copy)",
    rescale: "rescaled",
    procrustes: "rotated (procrustes)",
    affine: "carried by an affine map",
    "affine+refit": "affine map, decoder refitted",
  },
  /** Where an SAE's features come from. */
  origins: {
    scratch: "scratch",
    "from below": "from below",
    "from above": "from above",
    "same layer": "same layer",
  },
  /** Columns of the training log: a name, and what it means. */
  curves: {
    fvu: [
      "FVU",
      "FVU on the training tokens of each block: E‖x − x̂‖² / E‖x − E x‖², lower is better",
    ],
    loss: [
      "loss",
      "Training loss: reconstruction error in normalised units, with the auxiliary terms",
    ],
    l0: ["L0", "L0: mean number of active latents per token"],
    n_dead: ["dead latents", "Latents silent for longer than the leg's window (dead_after_tokens)"],
    learning_rate: ["learning rate", "The optimiser's learning rate"],
  },
};

/**
 * The word for a name, or the name itself where there is none.
 *
 * @template Label
 * @param {Record<string, Label>} words
 * @param {string} name
 */
const labelOf = (words, name) => words[name] ?? name;
