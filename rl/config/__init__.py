"""A recipe as types: one file a section, and what reads them from a mapping. Importing them loads no
torch.
"""
