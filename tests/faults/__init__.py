"""The campaign of faults: every program here has ``run(count, seed)``, which makes so many faults and counts
what came of them.
"""
