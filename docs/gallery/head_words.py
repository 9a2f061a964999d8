"""What heads say, in words.

The heads that write most at the last token, each with the tokens its write raises most.
"""

import interp
from circuits.words import words

model = interp.load()
report = words(model, "The opposite of hot is", neurons=0)
figure = report.figure("heads")
