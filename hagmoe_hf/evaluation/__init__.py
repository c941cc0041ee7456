"""Evaluation on real text, offline, with stock MTEB underneath.

command     the whole way, what `hagmoe evaluate` calls          mteb_api  what is used of mteb, or what to install
kit         local folders: find, validate, fingerprint           tasks     kit sets and Hub names -> mteb tasks
models      what is evaluated, and the fingerprint that keys it  items     the score of every query or item
runner      evaluate, resume, store                              compare   paired differences with bootstrap intervals
metrics     scores of vectors, without a task                    report    tables, JSON, bar plot
model_meta  a HAG-MoE for the MTEB leaderboard                   decontamination  training pairs against a kit
"""
