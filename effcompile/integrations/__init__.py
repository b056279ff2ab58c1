"""Put what FX graphs cannot hold into other libraries' own classes; each is imported only when it is asked for."""
