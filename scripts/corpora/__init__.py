"""Where the evaluation kit and the training pairs come from.

text     cleaning, cutting, and the hash that decides what is held out
markup   plain text out of pod, reStructuredText, HTML, man pages and gettext files
about    origin, licence and construction of every set of the kit
pairs    text pairs by domain
sources  download and unpack the packages, and read what is in them
"""
