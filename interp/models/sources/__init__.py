"""Where a model can come from: one file a source, returning a `Loaded` or raising a `BadInput`.

| source   | given as                        | file          |
|----------|---------------------------------|---------------|
| embedded | `smollm2-135m`                  | `embedded.py` |
| hub      | `org/name`                      | `hub.py`      |
| folder   | a folder with a `config.json`   | `folder.py`   |
| gguf     | a `.gguf` file                  | `gguf.py`     |
| live     | an `nn.Module` in memory        | `live.py`     |

`pretrained.py` is the one door to transformers' loaders: it silences their chatter and turns what
they raise, and what they only warn about, into one line with a next step.
"""
