"""Does the mixture pay? Arms trained alike, and the tables that say which is better.

arms      what is compared: small declarative entries, by table
budgets   how long, on how much, at which rates
inputs    tokenize and pack once; what a training step reads
models    an arm becomes a SentenceTransformer
routers   routing that is not learned: by token, by text, by the true domain
loop      one run: training, checkpoints, the curve on held-out pairs
scoring   held-out ranking, and the kit's sets through recorded vectors
run       which runs a table needs, one after the other, each a JSON file
parting   what parted experts do to pairs            lengths  and to long and short texts
results   the files of results: names, what is still due, the best rate
goal      what a gain has to be to count
report    the files become tables and a verdict        plots  and pictures
"""
