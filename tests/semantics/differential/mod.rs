//! Random requests, answered alike by Holdfast and by etcd.
