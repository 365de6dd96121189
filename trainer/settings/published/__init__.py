"""What the published LMPO, SimPO and gamma-PO files mean here: keys, values, objectives.

`keys` is the table of published keys, by which `translation` gives settings our names and then
names the objective and its hyperparameters; `loss_type` asks about names of losses. `scripts` has
what the scripts did besides. May import `errors` and `objectives`; knows nothing of
`PreferenceConfig`. Start in `translation`.
"""
