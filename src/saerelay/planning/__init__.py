"""What a run will do, decided before it starts: the recipe, the plan it compiles to, and what that costs.

Pure Python, without torch: a plan is made, shown and compared without loading weights. `choose` implements
`preset = "auto"`. May import the ground and the specs of `sae`.
"""
