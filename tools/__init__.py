"""Checks of the repository as a whole, before it is published: the registry's rules, and node signatures against
another version.
"""
