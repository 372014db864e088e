// The words for names that occur in the data files. No other script spells them out.
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
    identity: "copied unchanged",
    rescale: "rescaled",
    procrustes: "rotated (Procrustes)",
    affine: "affine map",
    "affine+refit": "affine map + decoder refit",
  },
  /** Where an SAE's features come from. */
  origins: {
    scratch: "from scratch",
    "from below": "from an earlier layer",
    "from above": "from a later layer",
    "same layer": "from the same layer",
  },
  /** Columns of the training log: a name, and what it means. */
  curves: {
    fvu: [
      "FVU",
      "FVU on the training tokens of each block: E‖x − x̂‖² / E‖x − E x‖²; lower is better",
    ],
    loss: ["loss", "Training loss in normalised units, including auxiliary terms"],
    l0: ["L0", "L0: mean number of active features per token"],
    n_dead: [
      "dead features",
      "Dead features: those that have not fired for longer than the leg's dead_after_tokens",
    ],
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

/** @param {string} label at the beginning of a sentence */
const capitalised = (label) => label.charAt(0).toUpperCase() + label.slice(1);
