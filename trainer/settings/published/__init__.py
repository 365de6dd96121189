"""What the published LMPO, SimPO and gamma-PO files mean here: keys, values, objectives.

Start in `translation`.
"""
