"""How well routers route: small models, trained here and merged by moeplan and by mergekit-moe, judged by their loss.

Like the suite beside it, it runs programs as a user does and imports nothing of moeplan. `settings` says how large
everything is, `texts` where the four domains' text is from, `training` makes the base and its experts, `rows` has the
table's rows as data, `merging` makes them, `evaluation` judges them, the rest shows what came out.
"""
