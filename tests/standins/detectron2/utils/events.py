_storages = []


class EventStorage:
    """A context in which `put_scalar` is known; `latest` is what was put."""

    def __init__(self, start_iter=0):
        self.iter = start_iter
        self._latest = {}

    def put_scalar(self, name, value, smoothing_hint=True, cur_iter=None):
        self._latest[name] = (float(value), self.iter)

    def latest(self):
        return self._latest

    def __enter__(self):
        _storages.append(self)
        return self

    def __exit__(self, *exception):
        _storages.pop()


def get_event_storage():
    assert _storages, "no EventStorage is entered"
    return _storages[-1]
