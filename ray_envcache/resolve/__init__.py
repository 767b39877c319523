"""From a field value to the resolved set: the packages that will really be installed here."""
