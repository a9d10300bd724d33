"""Networks of other projects, defined here: their weights load under the names that those projects gave them."""
