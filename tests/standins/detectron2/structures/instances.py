class Instances:
    """Fields of one length, as attributes, of an image of this (height, width)."""

    def __init__(self, image_size, **kwargs):
        self._image_size = image_size
        self._fields = {}
        for name, value in kwargs.items():
            self.set(name, value)

    @property
    def image_size(self):
        return self._image_size

    def set(self, name, value):
        if self._fields:
            assert len(self) == len(value), f"a field of length {len(value)} does not fit one of {len(self)}"
        self._fields[name] = value

    def __setattr__(self, name, value):
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self.set(name, value)

    def __getattr__(self, name):
        if name == "_fields" or name not in self._fields:
            raise AttributeError(f"no field {name}")
        return self._fields[name]

    def has(self, name):
        return name in self._fields

    def get_fields(self):
        return self._fields

    def __len__(self):
        for value in self._fields.values():
            return len(value)
        raise NotImplementedError("without fields there is no length")

    def __getitem__(self, item):
        return Instances(self._image_size, **{name: value[item] for name, value in self._fields.items()})

    def to(self, *args, **kwargs):
        return Instances(self._image_size, **{name: value.to(*args, **kwargs) for name, value in self._fields.items()})
