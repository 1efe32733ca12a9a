"""The benchmark suite: moeplan beside its peers and the limits of the machine, in the same rounds of one run.

It runs programs as a user does and measures them from outside; it imports nothing of moeplan.
"""
