<<<<<<< HEAD
"""The checker of annotations that conftest.py installs; an int passes as a float."""
=======
"""The checker of annotations that conftest.py installs: beartype; an int is a float."""
>>>>>>> docs

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
