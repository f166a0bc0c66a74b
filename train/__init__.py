"""Training: packs and pruned UNets by recipe (`python -m train`), and the embedded emoji family. Never
imports nodes/.
"""
